"""The training loop on two processes: as one process trains, and stopped on both by a signal to either."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY
from small_training import LOCALITY, assert_same_checkpoint, make_dwr_trainer, train

from dynaroute.training.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two_processes.py wrote."""
    folder = tmp_path_factory.mktemp("two_processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = REPOSITORY / "tests/support/two_processes.py"
    done = subprocess.run([*launcher, str(script), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_train_dwr_as_one_does_though_experts_stay_empty_on_one_of_them(folder):
    passes = [torch.tensor(json.loads((folder / f"passes{rank}.json").read_text())) for rank in (0, 1)]
    used = [(own > 0).view(14, 2, 2, 16).any(1) for own in passes]  # [step, layer, expert], in either of two passes
    assert (used[0] & ~used[1]).any()
    assert (used[1] & ~used[0]).any()
    assert not (used[0] | used[1]).all()

    with make_dwr_trainer(folder / "one") as trainer:
        history = trainer.run().history
    (ours, our_state), (theirs, _) = (load_checkpoint(folder / name / "last.safetensors") for name in ("both", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "attention.k.bias" in name:  # adds the same to all scores of a query: its gradient is rounding alone
            continue
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    for one, other in zip(our_state["history"], history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_two_processes_count_the_load_of_both_and_draw_the_same_bonus_for_a_window(folder):
    with make_dwr_trainer(folder / "one_loss_free", **LOCALITY) as trainer:
        trainer.run()
    (ours, _), (theirs, _) = (
        load_checkpoint(folder / f"{name}_loss_free/last.safetensors") for name in ("both", "one")
    )
    for layer in range(2):
        for name in ("selection_bias", "assigned"):
            key = f"model.layers.{layer}.moe.{name}"
            assert theirs[key].any()
            assert torch.equal(ours[key], theirs[key])


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_the_run_goes_on_from_there(folder):
    steps = {"step0": 5, "step1": 5, "validation0": 7, "validation1": 7, "saving0": 4}
    for name, step in steps.items():
        for rank in (0, 1):
            said = (folder / f"{name}-said-by-{rank}").read_text()
            assert said.startswith(f"stopped by SIGTERM at step {step} of 21"), name
        assert_same_checkpoint(folder / "whole" / "last.safetensors", folder / name / "last.safetensors")


def test_two_processes_that_waited_for_another_run_train_as_those_that_did_not(folder):
    assert_same_checkpoint(folder / "whole" / "last.safetensors", folder / "waited" / "last.safetensors")


def test_one_process_goes_on_from_where_two_were_stopped(folder):
    assert load_checkpoint(folder / "left" / "last.safetensors")[1]["step"] == 5
    runs = [train(folder / name, dropout=0.0, micro_batch_size=2) for name in ("left", "alone")]
    for one, other in zip(*(run.state.history for run in runs), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
