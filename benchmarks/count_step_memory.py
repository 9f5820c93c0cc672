"""Counts the memory of a DAGFormer training step at the published sizes, without allocating it.

    python benchmarks/count_step_memory.py

The base has the sizes of `dagformer.base` in params/gpu.yaml, which are OLMo-2-0425-1B's; the variant is P1. A step is
what train_dagformer does: forward through predictor and base, NLL, backward, AdamW. Its tensors have shapes but no
memory, and each is counted as long as it lives. An allocator and a GPU's libraries take more (usually a tenth), which
is not counted. Heads are sent as on a CPU; a GPU keeps a little less of them.

Reads   params/gpu.yaml
Writes  reports/benchmarks/step_memory.json
"""

import itertools
import weakref
from typing import Any

import torch
from benchmark_dagformer_step import ENCODER, VOCABULARY
from timing import show
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from dynaroute.config import Settings, load_settings
from dynaroute.config.dagformer import Variant
from dynaroute.dagformer.bases import new_base
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.stage import run
from dynaroute.training.nll import nll

EMBEDDING = ENCODER["hidden_size"]
STEPS = 2  # AdamW makes its moments at the first


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


def main(_: Settings) -> None:
    """Counts and writes the report."""
    settings = load_settings("params/gpu.yaml")
    variant, seq_len = settings.variant("P1"), settings.dagformer.seq_len
    rows = []
    cells = list(itertools.product((False, True), (1, 2, 4)))
    for joint, windows in tqdm(cells, desc="count_step_memory", unit="setting", disable=None):
        row = {"base_is_trained": joint, "micro_batch_size": windows, "seq_len": seq_len}
        rows.append(row | count(settings, variant, joint, windows))
    show(rows, *rows[0])
    write_json("reports/benchmarks/step_memory.json", {"results": rows, "torch": torch.__version__})


def count(settings: Settings, variant: Variant, joint: bool, windows: int) -> dict[str, int]:
    """Bytes of a step of one micro-batch of `windows` windows.

    Returns:
        weights_bytes: base in bf16 and predictor, with stacked copies. `joint` adds a trained base in fp32, and what
            the evaluation at A = 1 leaves behind.
        kept_bytes: what the forward pass keeps for the backward pass, logits and loss included.
        peak_bytes: the most at any time, with weights, gradients and moments.
    """
    seq_len = settings.dagformer.seq_len
    with FakeTensorMode(), MemoryCount() as memory:
        tokens = torch.randint(VOCABULARY, (windows, seq_len + 1))
        graph = dense = DagForward(make_base(settings, torch.bfloat16))
        nodes = graph.num_layers * graph.num_heads
        predictor = StructurePredictor(variant, graph.num_layers, graph.num_heads, EMBEDDING)
        trained = list(predictor.parameters())
        if joint:
            graph = DagForward(make_base(settings, torch.float32), trainable=True)
            trained += graph.base.parameters()
            with torch.no_grad():
                dense(tokens[:, :-1], torch.ones(windows, nodes, nodes))
        weights = memory.now
        optimizer = torch.optim.AdamW(trained, fused=True)
        kept = 0
        for _ in range(STEPS):
            before = memory.now
            noise = torch.randn(windows, nodes, nodes)
            adjacency = predictor(torch.randn(windows, EMBEDDING), variant.tau_init, "train", noise)
            loss = nll(graph(tokens[:, :-1], adjacency), tokens[:, 1:])
            kept = max(kept, memory.now - before)  # the second step has the buffer of the first
            loss.backward()
            del loss, adjacency
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"weights_bytes": weights, "kept_bytes": kept, "peak_bytes": memory.peak}


def make_base(settings: Settings, dtype: torch.dtype) -> torch.nn.Module:
    """A base of the sizes of `dagformer.base`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return new_base(settings.dagformer.base, VOCABULARY, settings.dagformer.seq_len, eot_id=0).eval()
    finally:
        torch.set_default_dtype(default)


if __name__ == "__main__":
    run(main, __doc__)
