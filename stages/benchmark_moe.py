"""Times the MoE layer at the paper's sizes against a dense FFN of the same FLOPs and against other dispatches.

    PYTHONPATH=src python stages/benchmark_moe.py        (or: dvc repro benchmarks/dvc.yaml:benchmark_moe)

Writes  reports/benchmarks/moe.json

Forward and backward of one layer (512 -> 2048 -> 512, 16 experts, top-2) on T tokens, fp32 on a CPU and bf16 on CUDA.
Candidates take turns, so that what else the machine does falls on all of them alike; medians are reported. Ratios are
to a dense FFN of the same kind and FLOPs: GELU of width 4096 for ours and the plain loop; for transformers, whose
Mixtral has gated experts (three matrices), a gated FFN with the FLOPs of its two active experts.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaroute.artifacts import write_json
from dynaroute.config import Settings
from dynaroute.dwr.model import DWRConfig, DWRTransformer, MoE, expert_ffn
from dynaroute.machine import describe_machine
from dynaroute.stage import run

D, F_EXPERT, E, K = 512, 2048, 16, 2
TOKENS = (512, 2048, 8192)
ROUNDS, WARM_UP = 15, 3
GATED_WIDTH = 1360  # 3 * 1360 matrices of a gated expert do about the work of 2 * 2048


class LoopMoE(MoE):
    """The textbook dispatch: a loop over all experts, each picking its tokens by a mask and adding to the output."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[B, T, D] -> [B, T, D]."""
        flat = x.reshape(-1, x.shape[-1])  # [S, D]
        weights, chosen = self.router(flat).softmax(-1).topk(self.config.top_k)  # [S, K]
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(flat)
        for expert, parameters in self.experts.fetch(list(range(self.config.num_experts))):
            token, rank = torch.where(chosen == expert)
            y.index_add_(0, token, weights[token, rank, None] * expert_ffn(flat[token], parameters))
        return y.view_as(x), None


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
    """All layers, with weights of the same spread so that routing is alike."""
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


def seconds(step: Callable[[], None], device: str) -> float:
    """Wall time of one call, with what it queued on the device."""
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(steps: dict[str, Callable[[], None]], device: str) -> dict[str, list[float]]:
    """Times of all candidates, which take turns; the first rounds are left out."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return {name: values[WARM_UP:] for name, values in times.items()}


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward of a layer to its input and parameters."""

    def step() -> None:
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def training_step(model: DWRTransformer, tokens: Tensor) -> Callable[[], None]:
    """Forward and backward of a whole model."""

    def step() -> None:
        model(tokens).logits.logsumexp(-1).mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def whole_models(settings: Settings) -> dict[str, Callable[[], None]]:
    """Training steps of params.yaml's model with our dispatch and with the plain loop, on the same weights."""
    dwr = settings.dwr
    config = DWRConfig(vocab_size=2048, **dwr.model_dump(include=set(DWRConfig.model_fields) - {"vocab_size"}))
    ours, loop = DWRTransformer(config), DWRTransformer(config)
    for layer in loop.layers:
        layer.moe.__class__ = LoopMoE
    loop.load_state_dict(ours.state_dict())
    tokens = torch.randint(2048, (dwr.training.micro_batch_size, dwr.max_seq_len))
    return {"dynaroute": training_step(ours, tokens), "plain_loop": training_step(loop, tokens)}


def main(settings: Settings) -> None:
    """Measures, prints a table and writes the report."""
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = candidates(device, torch.bfloat16 if device == "cuda" else torch.float32)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(1, tokens, D, device=device, dtype=next(layers["dense"].parameters()).dtype, requires_grad=True)
        times = interleaved({name: layer_step(layer, x) for name, layer in layers.items()}, device)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            own_dense = medians["gated_dense" if name.startswith(("gated", "transformers")) else "dense"]
            quartiles = statistics.quantiles(values, n=4)
            rows.append(
                {
                    "tokens": tokens,
                    "layer": name,
                    "milliseconds": 1e3 * medians[name],
                    "interquartile_milliseconds": 1e3 * (quartiles[2] - quartiles[0]),
                    "ratio_to_dense": medians[name] / own_dense,
                }
            )
            print(f"T {tokens:5}  {name:24} {1e3 * medians[name]:8.1f} ms  {medians[name] / own_dense:5.2f} of dense")
    times = interleaved(whole_models(settings), "cpu")
    speed_up = statistics.median(times["plain_loop"]) / statistics.median(times["dynaroute"])
    print(f"training step of params.yaml's model: {speed_up:.2f} times the tokens/s of the plain loop")
    write_json(
        "reports/benchmarks/moe.json",
        {
            "sizes": {"d_model": D, "d_ff": F_EXPERT, "num_experts": E, "top_k": K},
            "rows": rows,
            "training_speed_over_plain_loop": speed_up,
            "machine": describe_machine(device),
        },
    )


if __name__ == "__main__":
    run(main, __doc__)
