"""Refuses environment variables that would change results, and processes started without a rank."""

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
NUM_PROCESSES = (
    "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS",
    "JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE", "PALS_NRANKS", "MPI_LOCALNRANKS",
)  # fmt: skip
OWN_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


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


def check_processes(may_be_several: bool) -> None:
    """Refuses to be one of several processes that do not know of each other: each would do all of the work.

    The script of an sbatch job is a single process, whatever SLURM_NTASKS says; SLURM_STEP_NUM_TASKS comes from srun.

    Raises:
        DynarouteError: mpirun, srun or the like started this process without a rank, or the stage needs a single one.
    """
    for name in NUM_PROCESSES:
        number = os.environ.get(name, "1")
        if number in ("", "0", "1"):
            continue
        if not may_be_several:
            raise DynarouteError(f"{name}={number}: this stage is a single process: start one")
        if not os.environ.keys() >= OWN_RANK:
            raise DynarouteError(
                f"{name}={number}, but {', '.join(sorted(OWN_RANK))} are not all set: processes would not know of one "
                "another: start them with torchrun or accelerate launch"
            )
    rank = os.environ.get("RANK", os.environ.get("PMIX_RANK", "0"))
    if rank != "0" and not os.environ.keys() >= OWN_RANK:
        raise DynarouteError(f"this is process {rank} of several, but {', '.join(sorted(OWN_RANK))} are not all set")
