"""Refuses environment variables that would change results."""

import os

from dynaroute.errors import DynarouteError

OFF = {"", "0", "false", "f", "no", "n", "off", "strict"}
# Read by torch, by its libraries and by accelerate.
CHANGES_RESULTS = {
    # precision
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE", "ACCELERATE_FP8_BACKEND",
    # kernels, and so the order in which floats are added
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "PYTORCH_TUNABLEOP_ENABLED", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINEAR_FLATTEN_3D", "DISABLE_ADDMM_CUDA_LT",
    "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE",
    # threads and devices other than those of params.yaml
    "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "ACCELERATE_TORCH_DEVICE",
}  # fmt: skip


def check_environment(device: str) -> None:
    """Refuses variables that change results, which neither DVC nor a run's identity would notice.

    `accelerate launch` sets ACCELERATE_USE_FSDP and the like from its options; its defaults pass. ACCELERATE_USE_CPU
    would override `device`, that of params.yaml.

    Raises:
        DynarouteError: naming the variable.
    """
    for name, value in os.environ.items():
        switch = name.startswith("ACCELERATE_USE_") and (name, device) != ("ACCELERATE_USE_CPU", "cpu")
        if (switch or name in CHANGES_RESULTS) and value.lower() not in OFF:
            raise DynarouteError(f"{name}={value} in the environment changes results: unset it")
