"""Times the MoE layer against a dense FFN and other dispatches, and training with it against other models.

    PYTHONPATH=src python benchmarks/benchmark_moe.py        (or: dvc repro benchmarks/dvc.yaml:benchmark_moe)

Reads   data/tokens/<dwr.corpus>
Writes  reports/benchmarks/moe.json

Layers: forward and backward of one layer at the paper's sizes (512 -> 2048 -> 512, 16 experts, top-2) on T tokens,
fp32 on a CPU and bf16 on CUDA. Ratios are to a dense FFN of the same kind and FLOPs: GELU of width 4096 for ours and
the plain loop; for transformers, whose Mixtral has gated experts (three matrices), a gated FFN with the FLOPs of its
two active experts.

Training: whole optimizer steps of params.yaml's model as train_dwr takes them, on one micro-batch of the training
split. `plain_loop` starts with the same weights and differs only in its dispatch: both route, respect the capacity,
record router statistics, and minimise NLL and balance loss. `dense` has an FFN of width top_k * d_ff in place of every
MoE layer, so as many of its parameters are active, and no router. CUDA adds `_compiled` models, torch.compile on every
block. Ours runs its experts one after another on a CPU, and all at once in bf16 on CUDA (`ResidentExperts.run_all`).

Candidates take turns, and medians over rounds are reported. Ratios compare times of the same round.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timing import failure, interleaved, milliseconds, quartiles, ratios, show, training_step
from torch import Tensor, nn

from dynaroute.config import Settings
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.dwr.model import DWRConfig, DWRTransformer, MoE, RouterStatistics, expert_ffn
from dynaroute.dwr.objective import DWRObjective
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.machine import describe_machine
from dynaroute.pipeline.stage import run
from dynaroute.training.loop import Batch, make_accelerator

D, F_EXPERT, E, K = 512, 2048, 16, 2
TOKENS = (512, 2048, 8192)
ROUNDS, WARM_UP = 15, 3
RATIOS = (("dynaroute", "plain_loop"), ("dynaroute", "dense"), ("dynaroute_compiled", "dense_compiled"))
GATED_WIDTH = 1360  # 3 * 1360 matrices of a gated expert do about the work of 2 * 2048


class LoopMoE(MoE):
    """The textbook dispatch: a loop over all experts, each picking its tokens by a mask and adding to the output."""

    def dispatch(self, x: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """The same result as `MoE.dispatch`."""
        capacity = self.capacity(x.shape[0])
        y = torch.zeros_like(x)
        for expert, parameters in self.experts.fetch(list(range(self.config.num_experts))):
            token, rank = (index[:capacity] for index in torch.where(chosen == expert))
            y.index_add_(0, token, (weights[token, rank, None] * expert_ffn(x[token], parameters)).to(y.dtype))
        return y


class DenseLayer(nn.Module):
    """A feed-forward layer with as many parameters as are active in an MoE layer, without the router's."""

    def __init__(self, config: DWRConfig) -> None:
        super().__init__()
        width = config.top_k * config.d_ff
        self.up, self.down = nn.Linear(config.d_model, width), nn.Linear(width, config.d_model)

    def forward(self, x: Tensor, simulated: None = None) -> tuple[Tensor, RouterStatistics]:
        """[B, T, D] -> [B, T, D], and the statistics of no router."""
        nothing = x.new_zeros(())
        return self.down(F.gelu(self.up(x))), RouterStatistics(*[nothing] * len(RouterStatistics._fields))


class GatedFFN(nn.Module):
    """A dense SwiGLU feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def mixtral(implementation: str) -> nn.Module:
    """transformers' Mixtral layer with one of its dispatches."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=GATED_WIDTH, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    return MixtralSparseMoeBlock(config)


def candidates(device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All layers, with weights of the same spread, so that they route alike."""
    config = DWRConfig(
        d_model=D, d_ff=F_EXPERT, num_layers=1, num_heads=8, num_experts=E, top_k=K, max_seq_len=512, dropout=0.0,
        capacity_factor=None, vocab_size=64,
    )  # fmt: skip
    layers = {
        "dense": nn.Sequential(nn.Linear(D, K * F_EXPERT), nn.GELU(), nn.Linear(K * F_EXPERT, D)),
        "dynaroute": MoE(config),
        "plain_loop": LoopMoE(config),
        "gated_dense": GatedFFN(K * GATED_WIDTH),
        "transformers_eager": mixtral("eager"),
        "transformers_grouped_mm": mixtral("grouped_mm"),
    }
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        layer.to(device, dtype)
    return layers


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a layer to its input and parameters."""

    def step() -> None:
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def layer_rows(device: str) -> list[dict[str, Any]]:
    """Times of every layer at every number of tokens."""
    layers = candidates(device, torch.bfloat16 if device == "cuda" else torch.float32)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(1, tokens, D, device=device, dtype=next(layers["dense"].parameters()).dtype, requires_grad=True)
        steps = {name: layer_step(layer, x) for name, layer in layers.items()}
        failed = {name: reason for name, step in steps.items() if (reason := failure(step))}
        rows += [{"tokens": tokens, "layer": name, "failed": reason} for name, reason in failed.items()]
        steps = {name: step for name, step in steps.items() if name not in failed}
        times = interleaved(steps, ROUNDS, WARM_UP, device, f"layers, {tokens} tokens")
        medians = {name: quartiles(values)[0] for name, values in times.items()}
        for name, values in times.items():
            own_dense = medians["gated_dense" if name.startswith(("gated", "transformers")) else "dense"]
            ratio = {"ratio_to_dense": medians[name] / own_dense}
            rows.append({"tokens": tokens, "layer": name} | milliseconds(values) | ratio)
    show(rows, "tokens", "layer", "milliseconds", "ratio_to_dense")
    return rows


def training_models(config: DWRConfig) -> dict[str, DWRTransformer]:
    """The model with our dispatch, with the plain loop, and dense."""
    models = {"dynaroute": DWRTransformer(config)}
    models["plain_loop"] = copy.deepcopy(models["dynaroute"])
    for layer in models["plain_loop"].layers:
        layer.moe.__class__ = LoopMoE
    models["dense"] = copy.deepcopy(models["dynaroute"])
    for layer in models["dense"].layers:
        layer.moe = DenseLayer(config)
    return models


def compiled(model: DWRTransformer) -> DWRTransformer:
    """A copy with compiled blocks. The loop over experts is left out: each gets another number of tokens every step."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        if isinstance(layer.moe, MoE):
            layer.moe._run_experts = torch.compiler.disable(layer.moe._run_experts)
        layer.compile()
    return model


def training_steps(
    settings: Settings, accelerator: Accelerator
) -> tuple[dict[str, Callable[[], None]], dict[str, dict[str, Any]], DWRConfig]:
    """Optimizer steps of the models on one micro-batch, facts about each model, and the configuration of ours.

    A model that cannot take a step is only among the facts, with the reason.
    """
    dwr, device = settings.dwr, accelerator.device
    shards = TokenShards(Path("data/tokens") / dwr.corpus, "train")
    sizes = dwr.model_dump(include=set(DWRConfig.model_fields) - {"vocab_size"})
    config = DWRConfig(vocab_size=shards.padded_vocab_size, **sizes)
    windows = Windows(shards, dwr.max_seq_len, keep_tail=False)
    indices = [index % len(windows) for index in range(dwr.training.micro_batch_size)]
    tokens, targets = (part.to(device) for part in windows.batch(indices))
    batch = Batch(tokens, targets, torch.tensor(indices, device=device))

    models = training_models(config)
    if device.type == "cuda":
        models |= {f"{name}_compiled": compiled(models[name]) for name in ("dynaroute", "dense")}
    objective = DWRObjective(config, dwr.balance_coefficient)
    steps, known = {}, {}
    for name in list(models):
        known[name] = {"parameters": sum(parameter.numel() for parameter in models[name].parameters())}
        step = training_step(models.pop(name), objective, [batch], dwr.training, accelerator)
        if reason := failure(step) or failure(step):  # twice: the first step allocates the optimizer's states
            known[name]["failed"] = reason
            continue
        steps[name] = step
    return steps, known, config


def training_comparison(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """Training tokens/s of all models, and their ratios."""
    steps, models, config = training_steps(settings, accelerator)
    tokens = settings.dwr.training.micro_batch_size * config.max_seq_len
    times = interleaved(steps, ROUNDS, WARM_UP, settings.device, "training")
    for name, values in times.items():
        models[name] |= milliseconds(values) | {"tokens_per_second": tokens / quartiles(values)[0]}
    found = {}
    for ours, other in RATIOS:
        if ours in times and other in times:
            median, own = quartiles(ratios(times[other], times[ours]))
            found[f"{ours}_to_{other}"] = {"ratio": median, "quartiles": own}
    print("training tokens/s:", found)
    return {
        "tokens_per_step": tokens,
        "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        "models": models,
        "tokens_per_second_ratios": found,
    }


def main(settings: Settings) -> None:
    """Measures, prints a table and writes the report."""
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    accelerator = make_accelerator(settings.device, settings.dwr.training.precision)
    report = {
        "sizes": {"d_model": D, "d_ff": F_EXPERT, "num_experts": E, "top_k": K},
        "rows": layer_rows(settings.device),
        "training": training_comparison(settings, accelerator),
        "machine": describe_machine(settings.device),
    }
    write_json("reports/benchmarks/moe.json", report)


if __name__ == "__main__":
    run(main, __doc__)
