"""How an expert is stored: as 32-bit floats, which are exact, or quantized to fewer bits, which loses something.

At any precision on disk, experts compute in 32-bit floats: they are dequantized when they are read.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaroute.config.dwr import Precision
from dynaroute.config.schema import Positive, Section
from dynaroute.dwr.experts.kernel import product
from dynaroute.dwr.model import DWRConfig, DWRTransformer, ExpertWeights

# As safetensors names them.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
WIDENED_AT_ONCE = 2**19  # weights of a product in fewer bits: 2 MiB of floats, which stay in a core's cache


class TensorEntry(Section):
    """One tensor of a file."""

    shape: list[Positive]
    dtype: Literal["F32", "BF16", "F16", "I8"]

    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def stored_tensors(config: DWRConfig, precision: Precision) -> dict[str, TensorEntry]:
    """The tensors of an expert's file, in order: large ones first, so that each starts at a multiple of 64 bytes."""
    d, f = config.d_model, config.d_ff
    weights: Literal["F32", "BF16", "I8"] = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}[precision]
    entries = {name: TensorEntry(shape=shape, dtype=weights) for name, shape in (("w1", [d, f]), ("w2", [f, d]))}
    vectors = {"b1": [f], "b2": [d]}
    if precision == "int8":
        vectors |= {"scale1": [f], "scale2": [d]}
    return entries | {name: TensorEntry(shape=shape, dtype="F32") for name, shape in vectors.items()}


def to_int8(weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights in [-127, 127] as int8, and their scales, one for all along a dimension: `weights = scale * int8`."""
    scale = weights.abs().amax(dim).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weights / scale.unsqueeze(dim)).round().to(torch.int8), scale


def quantize(weights: ExpertWeights, precision: Precision) -> dict[str, Tensor]:
    """An expert's tensors as they are stored; biases stay 32-bit floats, and with fp32 all do.

    int8 is symmetric, with a scale for each output channel: `w[:, o] = scale[o] * q[:, o]`, q in [-127, 127].
    """
    tensors = weights._asdict()
    for name, scale in (("w1", "scale1"), ("w2", "scale2")):
        if precision == "bf16":
            tensors[name] = tensors[name].bfloat16()
        elif precision == "int8":
            tensors[name], tensors[scale] = to_int8(tensors[name], 0)
    return tensors


@torch.inference_mode()  # a thread outside of that mode cannot write to memory allocated in it
def dequantize(stored: Mapping[str, Tensor], out: ExpertWeights) -> None:
    """Writes stored tensors as 32-bit floats into `out`; on a GPU, from pinned memory, without waiting."""
    for name, source in stored.items():
        tensor = getattr(out, name, None)
        if tensor is None:  # a scale
            continue
        if source.dtype != tensor.dtype:  # or the CPU would cast it, and copy floats that are not pinned
            source = source.to(tensor.device, non_blocking=True)
        tensor.copy_(source, non_blocking=True)
    for name, scale in (("w1", "scale1"), ("w2", "scale2")):
        if scale in stored:
            weights = getattr(out, name)
            weights.mul_(stored[scale].to(weights.device, non_blocking=True))


def linear(x: Tensor, weights: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x w^T` [S, O] in 32-bit floats, for weights [O, I] of any precision, `scale` [O] being that of int8 ones.

    Weights in fewer bits are widened a few rows at a time, so that they are read from memory once, and as they are; for
    one token while they are multiplied, where the kernel can be compiled. A product in bf16 would round the token, and
    is 20 times slower on a CPU without instructions for it.
    """
    if weights.dtype == x.dtype:
        return F.linear(x, weights)
    if (out := product(x, weights)) is not None:
        return out if scale is None else out.mul_(scale)
    out = x.new_empty(len(x), len(weights))
    rows = max(1, WIDENED_AT_ONCE // weights.shape[1])
    wide = x.new_empty(min(rows, len(weights)), weights.shape[1])
    for start in range(0, len(weights), rows):
        part = weights[start : start + rows]
        torch.mm(x, wide[: len(part)].copy_(part).T, out=out[:, start : start + rows])
    return out if scale is None else out.mul_(scale)


def round_experts(model: DWRTransformer, precision: Precision) -> None:
    """Rounds the resident experts of a model, in place, to the values that they have when read from a store."""
    for layer in model.layers:
        for _, weights in layer.moe.experts.fetch(list(range(model.config.num_experts))):
            dequantize(quantize(weights, precision), weights)
