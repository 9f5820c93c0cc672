"""Times the DAG forward against its dense base and against the formulation that concatenates all head outputs.

    PYTHONPATH=src python benchmarks/benchmark_dag.py        (or: dvc repro benchmarks/dvc.yaml:benchmark_dag)

Writes  reports/benchmarks/dag.json

Random bases, OLMo-2 or, with fewer key/value heads than heads, Llama; sizes depend on `device`; fp32 on a CPU, bf16 on
CUDA:
    dense      transformers' own forward; backward to its embeddings, weights frozen
    ours       dynaroute.dagformer.graph on the same weights; backward to the adjacency
    reference  every layer concatenates the outputs of all earlier heads and mixes them by einsum in the adjacency's
               fp32; backward to the adjacency. Attention is fused as in the other two: only mixing differs.
The largest CUDA batches add `_compiled` candidates: torch.compile on all of dense and of the reference, and on norms
and MLPs of ours, since it cannot compile our mixing. A candidate that fails or runs out of memory is left out, with the
reason recorded. If dense or ours fails, the whole size is left out.

Candidates take turns. A ratio is the median over rounds of a candidate's time to dense's time in the same round.

The bounds are ratios to dense too. By FLOPs: dense has two units of work, mixing three (forward, heads, gates). By
bytes: dense's time, plus the head outputs, inputs and gradients that mixing has to move, at the bandwidth of a copy.
"""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import columns, failure, interleaved, milliseconds, quartiles, ratios, show
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb

from dynaroute.config import Settings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.machine import describe_machine, require_device
from dynaroute.pipeline.stage import run
from dynaroute.training.nll import nll

ROUNDS, WARM_UP = 9, 2
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """Layers, heads, model width, batch, tokens, vocabulary, key/value heads (None: H) and the MLP's width (None: 4 D);
    whether to time compiled candidates too."""

    L: int
    H: int
    D: int
    B: int
    T: int
    V: int = 2048
    KV: int | None = None
    F: int | None = None
    compiled: bool = False

    def shape(self) -> dict[str, int]:
        """What the report says of it."""
        return {
            **{key: getattr(self, key) for key in ("L", "H", "D", "B", "T")},
            "key_value_heads": self.KV or self.H,
            "intermediate_size": self.F or 4 * self.D,
            "vocabulary": self.V,
        }


SIZES = {
    "cpu": (
        Size(L=8, H=8, D=512, B=1, T=256),
        Size(L=12, H=16, D=1024, B=1, T=256),
        Size(L=30, H=9, D=576, B=1, T=256, V=49152, KV=3, F=1536),  # SmolLM2-135M
    ),
    # The published research code's 300M model, and OLMo-2-0425-1B, by its config.json on the hub.
    "cuda": tuple(
        Size(**shape, B=batch, T=1024, compiled=batch == 8)
        for shape in ({"L": 12, "H": 16, "D": 1024}, {"L": 16, "H": 16, "D": 2048, "V": 100352})
        for batch in (1, 2, 4, 8)
    ),
}


class ConcatenatingDag(nn.Module):
    """The DAG forward as it is usually written: every layer concatenates all earlier head outputs."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base

    def forward(self, tokens: Tensor, adjacency: Tensor) -> Tensor:
        """Tokens [B, T] and adjacency [B, N, N] to logits [B, T, V]."""
        model, H, KV = self.base.model, self.base.config.num_attention_heads, self.base.config.num_key_value_heads
        pre_norm = self.base.config.model_type == "llama"
        base = hidden = model.embed_tokens(tokens)
        B, T, D = base.shape
        cos_sin = model.rotary_emb(base, torch.arange(T, device=tokens.device)[None])
        sent: list[Tensor] = []  # [B, H, T, D] of every layer
        for n, layer in enumerate(model.layers):
            attention, norm = layer.self_attn, layer.post_attention_layernorm
            inputs = base[:, None].expand(B, H, T, D)
            if sent:
                gates = adjacency[:, : n * H, n * H : (n + 1) * H]
                heads = torch.cat(sent, dim=1).to(adjacency.dtype)
                inputs = inputs + torch.einsum("bij,bitd->bjtd", gates, heads).to(base.dtype)
            shared = inputs.unflatten(1, (KV, -1)).mean(2)
            if pre_norm:
                inputs, shared = layer.input_layernorm(inputs), layer.input_layernorm(shared)
            q, k, v = (
                torch.einsum("bhtd,hkd->bthk", x, p.weight.view(x.shape[1], -1, D)).flatten(2)
                for x, p in ((inputs, attention.q_proj), (shared, attention.k_proj), (shared, attention.v_proj))
            )
            if not pre_norm:
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k, v = (x.unflatten(-1, (-1, D // H)).transpose(1, 2) for x in (q, k, v))
            q, k = apply_rotary_pos_emb(q, k, *cos_sin)
            k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, K]
            raw = torch.einsum("bhtk,dhk->bhtd", z, attention.o_proj.weight.view(D, H, -1))
            if not pre_norm:
                square = raw.sum(1).float().square().mean(-1)
                rms = torch.sqrt(square + norm.variance_epsilon)[:, None, :, None]
                raw = norm.weight * raw / rms
            sent.append(raw.to(base.dtype))
            hidden = hidden + sent[-1].sum(1)
            mlp = layer.mlp(norm(hidden)) if pre_norm else layer.post_feedforward_layernorm(layer.mlp(hidden))
            base, hidden = base + mlp, hidden + mlp
        return self.base.lm_head(model.norm(hidden))


def make_base(size: Size, device: str) -> PreTrainedModel:
    """A random frozen base."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama" if size.KV else "olmo2", vocab_size=size.V, hidden_size=size.D, num_hidden_layers=size.L,
        intermediate_size=size.F or 4 * size.D, num_attention_heads=size.H, num_key_value_heads=size.KV or size.H,
        max_position_embeddings=size.T, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):  # drawing a billion weights takes a GPU no time
        base = AutoModelForCausalLM.from_config(config)
    return base.to(dtype).eval().requires_grad_(False)


def candidates(size: Size, device: str, compiled: bool = False) -> dict[str, Callable[[bool], Tensor]]:
    """A step of each candidate: forward, and on demand backward to embeddings or adjacency. It returns logits."""
    base = make_base(size, device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size.V, (size.B, size.T), generator=generator).to(device)
    nodes = size.L * size.H
    gates = (torch.rand(size.B, nodes, nodes, generator=generator) * dag_mask(size.L, size.H)).to(device)

    def step(forward: Callable[[Tensor], Tensor], source: Tensor) -> Callable[[bool], Tensor]:
        def call(backward: bool) -> Tensor:
            with torch.set_grad_enabled(backward):
                logits = forward(source.detach().requires_grad_(backward))
                if backward:
                    nll(logits[:, :-1], tokens[:, 1:]).backward()
            return logits.detach()

        return call

    def to_embeddings(model: nn.Module) -> Callable[[bool], Tensor]:
        return step(lambda x: model(inputs_embeds=x, use_cache=False).logits, base.model.embed_tokens(tokens))

    def to_gates(model: nn.Module) -> Callable[[bool], Tensor]:
        return step(lambda a: model(tokens, a), gates)

    found = {"dense": to_embeddings(base), "ours": to_gates(DagForward(base))}
    found["reference"] = to_gates(ConcatenatingDag(base))
    if compiled:
        found["dense_compiled"] = to_embeddings(torch.compile(base))
        found["ours_compiled"] = to_gates(DagForward(with_compiled_modules(base)))
        found["reference_compiled"] = to_gates(torch.compile(ConcatenatingDag(base)))
    return found


def with_compiled_modules(base: PreTrainedModel) -> PreTrainedModel:
    """A copy whose norms and MLPs are compiled."""
    base = copy.deepcopy(base)
    for module in base.model.modules():
        if type(module).__name__ in ("Olmo2RMSNorm", "Olmo2MLP"):
            module.compile()
    return base


class MemoryCount(TorchDispatchMode):
    """Sums the bytes of all storages that operations make while it is active: `now`, and at most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        old = {storage._cdata for storage in self._storages((args, kwargs))}  # a result may be a view of a weight
        for storage in self._storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in old and key not in self._known:
                self._known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, key, size)
        return result

    @staticmethod
    def _storages(tree: Any) -> list[torch.UntypedStorage]:
        return [value.untyped_storage() for value in tree_leaves(tree) if isinstance(value, Tensor)]

    def _remove(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def step_memory(size: Size, name: str, device: str) -> float:
    """Peak MiB above the weights of a candidate's first forward and backward: allocated on a GPU, counted on a CPU."""
    gc.collect()  # frees what earlier candidates held
    step = candidates(size, device)[name]
    if device == "cpu":
        with MemoryCount() as memory:
            step(True)
        return memory.peak / MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(True)
    return (torch.cuda.max_memory_allocated() - before) / MIB


def mixing_traffic(layers: int) -> int:
    """How often mixing in squares reads or writes one layer's head outputs, inputs or their gradients.

    Forward and backward as `dynaroute.dagformer.graph` does them. Temporaries and norms are not counted.
    """
    total = 3 * (layers - 1) + (layers - 2)  # outside mixing: heads, inputs, and the gradients of both
    for n in range(1, layers):
        size = n & -n
        sources, targets = size, min(n + size, layers) - n
        differentiable = n - max(n - size, 1)  # layer 0 depends on no gate
        total += sources + targets * (1 if n == size else 2)  # the first square of a target only writes
        total += sources + targets
        if differentiable:
            total += targets + differentiable * (1 if n + size >= layers else 2)
    return total


def bounds(size: Size, dense_seconds: float, bytes_per_second: float, item_size: int) -> dict[str, float]:
    """Lower bounds on forward + backward, as ratios to dense."""
    projections = (2 + 2 * (size.KV or size.H) / size.H) * size.D**2  # of q, k, v and o
    block = projections + 3 * size.D * (size.F or 4 * size.D) + size.D * size.T  # multiply-adds; attention is causal
    dense = 2 * (size.L * block + size.D * size.V)
    mixing = 3 * size.H**2 * size.D * size.L * (size.L - 1) // 2
    moved = mixing_traffic(size.L) * size.B * size.T * size.H * size.D * item_size  # bytes
    return {
        "flop_bound": (dense + mixing) / dense,
        "squares_mib": moved / MIB,
        "squares_byte_bound": 1 + moved / bytes_per_second / dense_seconds,
    }


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    # Large enough on a GPU that the 20 us around a copy do not count.
    source = torch.ones((2048 if device == "cuda" else 256) * MIB // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, ROUNDS, WARM_UP, device, "copy")["copy"]
    return 2 * source.nbytes / quartiles(times)[0]


def speed(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    """One candidate's milliseconds, and its ratio to dense."""
    return milliseconds(seconds[name]) | columns("ratio_to_dense", ratios(seconds[name], seconds["dense"]))


def measure(size: Size, device: str, bytes_per_second: float) -> dict[str, Any]:
    """All results of one size; where dense or ours cannot run, only the reasons."""
    steps = candidates(size, device, size.compiled)
    failed = {
        name: reason
        for name, step in steps.items()
        if (reason := failure(lambda step=step: (step(True), step(False))))  # each is compiled for itself
    }
    if "dense" in failed or "ours" in failed:
        return {"size": size.shape(), "candidates": {}, "failed": failed}
    for name in failed:
        del steps[name]
    difference = None
    if "reference" in steps:
        difference = (steps["ours"](False).float() - steps["reference"](False).float()).abs().max().item()

    forward, both = (
        interleaved(
            {name: functools.partial(step, backward) for name, step in steps.items()}, ROUNDS, WARM_UP, device, what
        )
        for backward, what in ((False, "forward"), (True, "forward and backward"))
    )
    found = {name: {"forward": speed(forward, name), "forward_backward": speed(both, name)} for name in steps}
    del steps  # and the memory they hold
    for name, row in found.items():
        if not name.endswith("_compiled"):
            row["forward_backward_peak_mib"] = step_memory(size, name, device)
    limits = bounds(size, quartiles(both["dense"])[0], bytes_per_second, 2 if device == "cuda" else 4)
    return {
        "size": size.shape(),
        "candidates": found,
        "failed": failed,
        "bounds": limits,
        "fraction_of_byte_bound": limits["squares_byte_bound"] / found["ours"]["forward_backward"]["ratio_to_dense"],
        "largest_difference_to_reference": difference,
    }


def main(settings: Settings) -> None:
    """Measures, prints a table and writes the report."""
    device = settings.device
    require_device(device)
    torch.set_num_threads(settings.num_threads)
    bytes_per_second = copy_bandwidth(device)
    results = []
    for size in SIZES[device]:
        result = measure(size, device, bytes_per_second)
        print(result["size"], result["failed"], result.get("bounds"))
        rows = [{"candidate": name} | row["forward_backward"] for name, row in result["candidates"].items()]
        show(rows, "candidate", "milliseconds", "ratio_to_dense")
        results.append(result)
        gc.collect()  # failures leave reference cycles, and the next size needs the memory
    if not any(result["candidates"] for result in results):
        raise DynarouteError(f"no size could be measured: {results[0]['size']}: {results[0]['failed']}")
    report = {
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "rounds": ROUNDS,
        "copy_gigabytes_per_second": bytes_per_second / 1e9,
        "results": results,
        "machine": describe_machine(device),
    }
    write_json("reports/benchmarks/dag.json", report)


if __name__ == "__main__":
    run(main, __doc__)
