"""The training loop: equal to a plain loop, the same after any interruption, and clear when it cannot go on."""

import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resuming import killed_at
from small_training import (
    InterruptedInAValidation,
    Model,
    Objective,
    Tokens,
    assert_same_checkpoint,
    make_trainer,
    train,
)

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.machine import compute_dtype
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint
from dynaroute.training.loop import make_accelerator


def test_training_equals_a_plain_loop(tmp_path):
    trainer = train(tmp_path, dropout=0.0)
    model, tokens = Model(0.0), Tokens(30)
    matrices, others = [model.output.weight], [model.embedding.weight, *model.norm.parameters(), model.output.bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21 - 3, eta_min=1e-3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])
    losses = []
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(30)
        for start in range(0, 28, 4):
            inputs, targets = tokens.batch(order[start : start + 4])
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.state_dict()[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    history = trainer.state.history
    assert [row["step"] for row in history] == [0, 7, 14, 21]
    assert history[2]["train_loss"] == pytest.approx(sum(losses[7:14]) / 7, rel=1e-5)
    assert [row["step"] for row in trainer.state.losses] == [1, 11, 21]
    assert [row["train_loss"] for row in trainer.state.losses] == pytest.approx(losses[::10], rel=1e-5)


def test_training_imports_no_compiler(tmp_path):
    """torch and accelerate would load it for a decorator or a look at the model, for more than a second."""
    code = f"import sys, pathlib, small_training; small_training.train(pathlib.Path({str(tmp_path)!r}));"
    code += "print({'torch._dynamo', 'torch.distributed.tensor', 'sympy'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("crash_at", [0, 1, 2, 3, 4, 7, 8, 13, 20])
def test_a_run_resumed_after_a_crash_ends_bit_for_bit_as_one_that_never_crashed(tmp_path, crash_at):
    whole = train(tmp_path / "whole")
    with killed_at(Objective, "loss", crash_at):
        train(tmp_path / "resumed")
    resumed = train(tmp_path / "resumed")
    assert_same_checkpoint(whole.last_path, resumed.last_path)
    assert_same_checkpoint(whole.best_path, resumed.best_path)


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    trainer = train(tmp_path)
    before = trainer.last_path.read_bytes()
    assert train(tmp_path).state == trainer.state
    assert trainer.last_path.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [4, 6], ids=["between_validations", "before_a_validation"])
def test_a_signal_saves_and_stops_with_a_message_and_the_run_goes_on_from_there(tmp_path, number, step):
    def stop(now):
        if now == step:
            os.kill(os.getpid(), number)

    whole = train(tmp_path / "whole")
    with pytest.raises(DynarouteError, match=f"stopped by {number.name} at step {step + 1} of 21"):
        train(tmp_path / "resumed", Objective(stop))
    assert load_checkpoint(tmp_path / "resumed" / "last.safetensors")[1]["step"] == step + 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_checkpoint(whole.last_path, train(tmp_path / "resumed").last_path)


def test_accumulated_micro_batches_equal_the_whole_batch(tmp_path):
    whole = train(tmp_path / "whole", dropout=0.0)
    parts = train(tmp_path / "parts", dropout=0.0, micro_batch_size=1)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(whole.state.history, parts.state.history, strict=True):
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
        if one["step"]:
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_a_micro_batch_holds_no_memory_of_the_one_before(tmp_path):
    held, counts = [], []

    class Counting(Objective):
        def loss(self, model, batch, step):
            counts.append(sum(reference() is not None for reference in held))
            loss, metrics = super().loss(model, batch, step)
            held[:] = map(weakref.ref, (loss, *metrics.values()))
            return loss, metrics

    train(tmp_path, Counting(), batch_size=4, micro_batch_size=1)
    assert len(counts) > 4
    assert not any(counts)


def test_best_holds_the_weights_of_the_lowest_validation_loss(tmp_path):
    trainer = train(tmp_path, lr=0.5, epochs=6)
    losses = {row["step"]: row["validation_loss"] for row in trainer.state.history}
    best = min(losses, key=losses.get)
    tensors, state = load_checkpoint(trainer.best_path)
    assert (state["step"], state["validation_loss"]) == (best, losses[best])
    assert trainer.state.best_step == best
    assert best != trainer.state.step, "this test needs a run that gets worse in the end"
    trainer.model.load_state_dict(tensors)
    sums = trainer.validation_sums(trainer.validation)
    assert trainer.objective.validation_metrics(sums)["loss"] == losses[best]


def test_without_best_nothing_but_the_last_weights_is_written(tmp_path):
    kept, trainer = train(tmp_path / "kept"), train(tmp_path / "not", keep_best=False)
    assert not trainer.best_path.exists()
    assert_same_checkpoint(kept.last_path, trainer.last_path)


def test_early_stopping_counts_validations_without_improvement(tmp_path):
    trainer = train(tmp_path, lr=0.5, epochs=30, early_stopping_patience=2)
    losses = [row["validation_loss"] for row in trainer.state.history]
    assert len(losses) - 1 - losses.index(min(losses)) == 2
    assert trainer.state.step < trainer.total_steps
    assert train(tmp_path, lr=0.5, epochs=30, early_stopping_patience=2).state == trainer.state


def test_the_loss_on_another_text_is_recorded_and_decides_nothing(tmp_path):
    alone = train(tmp_path / "alone", lr=0.5, epochs=6)
    other = train(tmp_path / "other", lr=0.5, epochs=6, also_validate_on={"elsewhere": Tokens(9, seed=2)})
    recorded = [row.pop("validation_elsewhere_loss") for row in other.state.history]
    assert other.state == alone.state
    model, (tokens, targets) = other.model.eval(), Tokens(9, seed=2).batch(range(9))
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert recorded[-1] == pytest.approx(float(expected), rel=1e-6)
    assert len(set(recorded)) == len(recorded)


@pytest.mark.parametrize(("step", "saved", "factor"), [(1, 0, "inf"), (7, 7, "nan"), (12, 12, "inf")])
def test_a_loss_that_is_not_finite_stops_the_run_which_resumes_from_the_last_good_checkpoint(
    tmp_path, step, saved, factor
):
    class Faulty(Objective):
        def loss(self, model, batch, at):
            loss, metrics = super().loss(model, batch, at)
            return (loss * float(factor) if at == step else loss), metrics

    whole = train(tmp_path / "whole")
    message = rf"step {step + 1}: loss {factor}.*last\.safetensors \(step {saved}\)"
    with pytest.raises(DynarouteError, match=message):
        train(tmp_path / "faulty", Faulty())
    tensors, state = load_checkpoint(tmp_path / "faulty/last.safetensors")
    assert state["step"] == saved
    assert all(value.isfinite().all() for value in tensors.values())
    resumed = train(tmp_path / "faulty")
    assert_same_checkpoint(whole.last_path, resumed.last_path)


def test_a_signal_within_a_validation_changes_nothing_either(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(DynarouteError, match="stopped by SIGTERM at step 7 of 21"):
        train(tmp_path / "resumed", InterruptedInAValidation())
    assert_same_checkpoint(whole.last_path, train(tmp_path / "resumed").last_path)


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Diverging(Objective):
        def validation_metrics(self, sums):
            return {"loss": float("nan") if len(sums) and self.step == 14 else 1.0}

        def validation_sums(self, model, batch, step):
            self.step = step
            return super().validation_sums(model, batch, step)

    with pytest.raises(DynarouteError, match=r"step 14: validation loss nan.*last\.safetensors \(step 12\)"):
        train(tmp_path, Diverging())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    class Exploding(Objective):
        def loss(self, model, batch, step):
            loss, metrics = super().loss(model, batch, step)
            return loss + (0 * model.output.bias.sum()).sqrt(), metrics  # the square root's slope at 0 is infinite

    with pytest.raises(DynarouteError, match=r"step 1: loss .*gradient norm nan.*\(step 0\)"):
        train(tmp_path, Exploding())


def test_a_second_trainer_on_the_same_run_waits_and_goes_on_from_what_the_first_left(tmp_path):
    steps = []

    def enter() -> None:
        with make_trainer(tmp_path) as trainer:
            steps.append(trainer.state.step)

    second = threading.Thread(target=enter)
    with make_trainer(tmp_path) as first:
        second.start()
        first.run()
        assert not steps
    second.join()
    assert steps == [21]


def save_another_model(path: Path) -> None:
    tensors, state = load_checkpoint(path)
    save_checkpoint(path, tensors | {"model.output.weight": torch.zeros(2, 2)}, state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 7),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"model": 1}, path),
        save_another_model,
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    damage(train(tmp_path, epochs=1).last_path)
    with pytest.raises(DynarouteError, match=r"last\.safetensors"):
        train(tmp_path, epochs=1)


def test_batches_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DynarouteError, match="3 windows, fewer than batch_size = 4"):
        make_trainer(tmp_path, training=Tokens(3))


def test_a_run_that_would_end_within_its_warm_up_is_refused_before_it_starts(tmp_path):
    make_trainer(tmp_path / "run", epochs=1, warmup_steps=7)
    with pytest.raises(DynarouteError, match="warmup_steps = 8: must be at most the 7 steps that this run takes"):
        make_trainer(tmp_path / "run", epochs=1, warmup_steps=8)
    assert not (tmp_path / "run").exists()


def test_bf16_falls_back_to_fp32_where_it_would_be_slow():
    assert make_accelerator("cpu", "bf16").mixed_precision == "no"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_computes_in_fp32_unless_it_is_told_otherwise(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert compute_dtype("cuda", "fp32") == torch.float32
    assert compute_dtype("cuda", "bf16") == (torch.bfloat16 if has_bf16 else torch.float32)
