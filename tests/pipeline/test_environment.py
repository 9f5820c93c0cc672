"""Variables of the environment change no result, or are refused by name."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from repository import REPOSITORY
from small_training import assert_same_checkpoint, train

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.environment import CHANGES_RESULTS
from dynaroute.pipeline.scratch import exclusive
from dynaroute.pipeline.stage import run
from dynaroute.training.loop import make_accelerator

OVERRIDDEN = {
    "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.1", "ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "True", "ACCELERATE_USE_CPU": "True", "FSDP_OFFLOAD_PARAMS": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
}  # fmt: skip
OFF = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_FP8_BACKEND": "NO", "NVIDIA_TF32_OVERRIDE": "0"}
OFF |= {"OMP_DYNAMIC": "FALSE"}


def forget_the_environment():
    """Has accelerate read it again, as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerates_own_settings_change_nothing(tmp_path, monkeypatch):
    expected = train(tmp_path / "without", micro_batch_size=2)
    for name, value in (OVERRIDDEN | OFF).items():
        monkeypatch.setenv(name, value)
    forget_the_environment()
    try:
        found = train(tmp_path / "with", micro_batch_size=2)
    finally:
        forget_the_environment()
    assert_same_checkpoint(found.last_path, expected.last_path)


SWITCHES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")


@pytest.mark.parametrize("name", [*sorted(CHANGES_RESULTS), *(f"ACCELERATE_USE_{name}" for name in SWITCHES)])
def test_what_would_change_results_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(DynarouteError, match=f"^{name}=1 in the environment changes results: unset it"):
        make_accelerator("cpu", "fp32")


def test_a_gpu_that_accelerate_is_told_not_to_use_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    with pytest.raises(DynarouteError, match=r"^ACCELERATE_USE_CPU=yes in the environment"):
        make_accelerator("cuda", "fp32")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs a stage that only says that it has run, of which there may be several processes, or not."""
    (tmp_path / "params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["some_stage.py"])
    for name in ("RANK", "LOCAL_RANK", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)

    def start(launched: bool) -> list[str]:
        ran = []
        run(lambda settings: ran.append(settings.launcher), "What it does.", launched=launched)
        return ran

    return start


def test_every_stage_refuses_what_would_change_results(stage, monkeypatch):
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with pytest.raises(SystemExit, match=r"^some_stage: OMP_THREAD_LIMIT=1 in the environment"):
        stage(launched=False)


def test_processes_that_were_not_launched_together_do_not_all_do_the_work(stage, monkeypatch):
    monkeypatch.setattr("dynaroute.pipeline.stage.PATIENCE", 0)
    monkeypatch.setenv("RANK", "1")
    with exclusive(Path(".scratch/running_some_stage")):
        with pytest.raises(SystemExit, match=r"^some_stage: .*running_some_stage: process \d+ is already at work"):
            stage(launched=True)
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(SystemExit, match="is already at work"):
            stage(launched=False)
        assert stage(launched=True) == ["python"]


def test_accelerate_does_not_change_the_number_of_threads(monkeypatch):
    """It would, for several processes on a CPU, of which this is the only one."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    forget_the_environment()
    torch.set_num_threads(7)
    try:
        assert make_accelerator("cpu", "fp32").num_processes == 1
        assert torch.get_num_threads() == 7
    finally:
        torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)
        forget_the_environment()
