"""Describes the machine, for files of measurements only: outputs that must repeat never contain it."""

import importlib.metadata
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from dynaroute.errors import DynarouteError


def require_device(device: str) -> None:
    """Raises DynarouteError if params.yaml's `device` is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        found = f"this machine shows no CUDA device to PyTorch {torch.__version__}"
        raise DynarouteError(f"params.yaml: device = 'cuda': {found}; use cpu")


def compute_dtype(device: str, precision: str) -> torch.dtype:
    """The dtype of a `precision`: bf16 if it says so and the device computes it natively, else fp32."""
    fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" and fast else torch.float32


def describe_machine(device: str) -> dict[str, Any]:
    """Processor or GPU, threads and library versions."""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda} if device == "cuda" else {}),
        "transformers": importlib.metadata.version("transformers"),  # without importing it, which takes a second
        "accelerate": importlib.metadata.version("accelerate"),
    }


def peak_memory(device: str) -> int:
    """The most memory that this process has held, in bytes: allocated on the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
