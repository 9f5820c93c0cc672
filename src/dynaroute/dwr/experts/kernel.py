"""One token's product with weights in fewer bits, in C: they are widened while they are read, in one pass over memory.

The system's C compiler builds it when it is first needed, in a fraction of a second. Without one, or on a GPU,
`precision.linear` widens a few rows at a time instead. PyTorch has no such product: its own round the token as well.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Sums are kept in 64 lanes, whose order is fixed: compilers may not reorder additions, but can then use vectors.
SOURCE = """
#include <stdint.h>
#include <string.h>
#define LANES 64

static inline float widen_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}
static inline float widen_int8(int8_t value) { return value; }

#define PRODUCT(NAME, TYPE)                                                                              \\
    void NAME(const TYPE *weights, const float *x, float *out, int64_t rows, int64_t columns) {          \\
        for (int64_t row = 0; row < rows; row++, weights += columns) {                                   \\
            float sums[LANES] = {0}, total = 0;                                                          \\
            int64_t start = 0;                                                                           \\
            for (; start + LANES <= columns; start += LANES)                                             \\
                for (int i = 0; i < LANES; i++) sums[i] += widen_##NAME(weights[start + i]) * x[start + i]; \\
            for (int i = 0; start + i < columns; i++) sums[i] += widen_##NAME(weights[start + i]) * x[start + i]; \\
            for (int i = 0; i < LANES; i++) total += sums[i];                                            \\
            out[row] = total;                                                                            \\
        }                                                                                                \\
    }
PRODUCT(bfloat16, uint16_t)
PRODUCT(int8, int8_t)
"""
DTYPES = {torch.bfloat16: "bfloat16", torch.int8: "int8"}


@functools.cache
def _compiled() -> dict[torch.dtype, Callable[..., None]]:
    """The functions by dtype of the weights; none if they cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "product.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
        try:
            subprocess.run(command, input=SOURCE.encode(), capture_output=True, check=True)
            loaded = ctypes.CDLL(str(library))  # stays mapped
        except (OSError, subprocess.CalledProcessError):
            return {}
    functions = {dtype: getattr(loaded, name) for dtype, name in DTYPES.items()}
    for function in functions.values():
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
        function.restype = None
    return functions


def product(x: Tensor, weights: Tensor) -> Tensor | None:
    """`x w^T` float32 [1, O] for x float32 [1, I], weights [O, I]; None if this machine or dtype has no such kernel."""
    tensors = (x, weights)
    if len(x) != 1 or x.dtype != torch.float32 or weights.dtype not in DTYPES:
        return None
    if not all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors):
        return None
    if (function := _compiled().get(weights.dtype)) is None:
        return None
    out = x.new_empty(1, len(weights))
    function(weights.data_ptr(), x.data_ptr(), out.data_ptr(), *weights.shape)
    return out
