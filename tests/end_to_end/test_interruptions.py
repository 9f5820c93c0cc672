"""Training that is killed, or stopped at the time limit of a Slurm job, ends as one that was never disturbed."""

import os
import signal
import subprocess

import pytest
from tiny_pipeline import SMOKE

from dynaroute.training.checkpoints import load_checkpoint

LONGER = {"dwr.training": {**SMOKE["dwr"]["training"], "epochs": 0.4}}


@pytest.fixture(scope="module")
def undisturbed(finished, tmp_path_factory) -> dict[str, str]:
    """Hashes of the outputs of a longer training."""
    workspace = finished.copy(tmp_path_factory.mktemp("undisturbed") / "repository")
    workspace.set_params(LONGER)
    workspace.run("dvc", "repro", "train_dwr")
    return workspace.hashes()


@pytest.mark.parametrize("command", [("repro", "train_dwr"), ("exp", "run", "train_dwr")], ids=["repro", "exp_run"])
def test_a_killed_training_goes_on_and_ends_as_one_that_was_never_killed(finished, undisturbed, tmp_path, command):
    killed = finished.copy(tmp_path / "killed")
    killed.set_params(LONGER)
    for step in (3, 20):
        process = killed.start("dvc", *command)
        killed.wait_for_checkpoint(step)
        if step == 3:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # DVC alone: the trainer saves and leaves by itself, or the next one would be refused
        process.wait()
        assert not (killed.root / "data/dwr/train").exists()
    killed.run("make", "recover")
    killed.run("dvc", *command)
    assert not list(killed.root.glob(".scratch/train_dwr/*"))
    assert killed.hashes() == undisturbed


def test_a_slurm_job_is_requeued_at_its_time_limit_alone_and_ends_as_one_without_a_limit(
    finished, undisturbed, tmp_path
):
    limited = finished.copy(tmp_path / "limited")
    limited.set_params(LONGER)
    requeued = tmp_path / "requeued"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {requeued}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    limited.environment["PATH"] = f"{tmp_path / 'bin'}:{limited.environment['PATH']}"
    limited.environment["SLURM_JOB_ID"] = "17"
    # No signal for the trainer of another job, nor for a process with the number of one that is gone.
    bystanders = []
    for name in ("other", "stale"):
        lock = limited.root / f".scratch/train_dwr/{name}/lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        held = ["flock", "--no-fork", str(lock)] if name == "other" else []
        bystanders.append(subprocess.Popen([*held, "sleep", "600"]))
        lock.write_text(str(bystanders[-1].pid))
    job = limited.start("bash", "scripts/repro.sbatch", "train_dwr")
    limited.wait_for_checkpoint(3)
    job.send_signal(signal.SIGTERM)  # as `scancel` does
    assert job.wait(timeout=60) == 143
    assert not requeued.exists()
    (checkpoint,) = limited.root.glob(".scratch/train_dwr/*/last.safetensors")
    saved = load_checkpoint(checkpoint)[1]["step"]
    job = limited.start("bash", "scripts/repro.sbatch", "train_dwr")
    limited.wait_for_checkpoint(saved + 3)
    job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@900` does: to the batch script alone
    assert job.wait(timeout=60) == 0
    assert requeued.read_text() == "requeue 17\n"
    for bystander in bystanders:
        assert bystander.poll() is None
        bystander.kill()
        bystander.wait()
    assert not (limited.root / "data/dwr/train").exists()
    limited.run("bash", "scripts/repro.sbatch", "train_dwr")  # what Slurm does next
    assert requeued.read_text() == "requeue 17\n"
    assert limited.hashes() == undisturbed
