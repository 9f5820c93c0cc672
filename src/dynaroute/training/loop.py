"""The one training loop. What is trained, and on what loss, is an `Objective`'s business.

Every random draw is a function of (seed, step, micro-batch), and data order of (seed, epoch). So a run that was killed
and resumed from its last checkpoint takes the same steps as an uninterrupted one. Devices, mixed precision and several
processes are accelerate's.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from tqdm import tqdm

from dynaroute.config.training import EpochTraining, Training
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.environment import check_environment
from dynaroute.pipeline.machine import compute_dtype, require_device
from dynaroute.pipeline.scratch import StopRequest, discard, exclusive
from dynaroute.training.checkpoints import (
    load_checkpoint,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
)
from dynaroute.training.schedules import decay_groups, warmup_cosine


class Batch(NamedTuple):
    """Windows of text on the training device."""

    tokens: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64, -100 where there is nothing to predict
    windows: Tensor  # [B] int64, which windows they are


class Objective(Protocol):
    """What is being trained."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and scalars to average for the record."""

    def validation_sums(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Sums over the batch, after `step` steps; they are added up over all batches and processes."""

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Metrics from the sums over the whole validation set; `loss` decides which model is best."""


LOSS_EVERY = 10  # steps


@dataclass
class TrainingState:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each validation
    losses: list[dict[str, Any]] = field(default_factory=list)  # of every LOSS_EVERY-th step, from the first on
    best_step: int = 0
    best_loss: float = math.inf
    validations_without_improvement: int = 0

    def to_json(self) -> dict[str, Any]:
        """The state with the infinity of a run without validation as None: JSON has no infinity."""
        return {**vars(self), "best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TrainingState":
        """What `to_json` gave."""
        return cls(**{**data, "best_loss": math.inf if data["best_loss"] is None else data["best_loss"]})


def make_accelerator(device: str, precision: str) -> Accelerator:
    """The accelerator for params.yaml's `device` and a `precision`; bf16 falls back to fp32 where it would be slow.

    What accelerate would otherwise read from the environment is given here, so that no variable changes a result.

    Raises:
        DynarouteError: the device is not there, or what `check_environment` raises.
    """
    check_environment(device)
    require_device(device)
    bf16 = compute_dtype(device, precision) == torch.bfloat16
    # An expert that no token of a batch chose is not part of that step's graph.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    threads = torch.get_num_threads()
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        cpu=device == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[unused],
    )
    torch.set_num_threads(threads)  # accelerate divides the cores among processes on a CPU
    return accelerator


def steps_in_epochs(settings: EpochTraining, num_windows: int) -> int:
    """The optimizer steps of `settings.epochs` passes over the training windows, at least one.

    Raises:
        DynarouteError: there is not one whole batch.
    """
    return max(1, round(settings.epochs * steps_per_epoch(num_windows, settings.batch_size)))


def steps_per_epoch(num_windows: int, batch_size: int) -> int:
    """Whole batches in one pass over the training windows; the incomplete last one is left out.

    Raises:
        DynarouteError: there is not one whole batch.
    """
    if num_windows < batch_size:
        raise DynarouteError(f"the training split has {num_windows} windows, fewer than batch_size = {batch_size}")
    return num_windows // batch_size


def own_share(windows: WindowSet, accelerator: Accelerator) -> range:
    """The windows that this process scores when all share them out.

    Raises:
        DynarouteError: there are too few for every process to have one.
    """
    if len(windows) < accelerator.num_processes:
        raise DynarouteError(
            f"params.yaml: launcher starts {accelerator.num_processes} processes, but they have {len(windows)} windows "
            "to score together: must be at most as many: start fewer, or score more windows"
        )
    return range(accelerator.process_index, len(windows), accelerator.num_processes)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its decorators for torch.compile, which import torch._dynamo: 1.3 s for each training."""

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__
    load_state_dict = torch.optim.Optimizer.load_state_dict.__wrapped__
    state_dict = torch.optim.Optimizer.state_dict.__wrapped__
    zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
    step = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)


class Trainer:
    """Trains one model with one objective, resumably, in a scratch folder that it holds for itself as a context."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        training: WindowSet,
        validation: WindowSet,
        settings: Training,
        *,
        total_steps: int,
        accelerator: Accelerator,
        seed: int,
        scratch: Path,
        start: Path | None = None,
        parameter_groups: list[dict[str, Any]] | None = None,
        remark: Callable[[list[dict[str, Any]]], str] | None = None,
        also_validate_on: Mapping[str, WindowSet] | None = None,
        early_stopping_patience: int | None = None,
        keep_best: bool = True,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Prepares a run in the folder `scratch`, starting from the weights and moments of the checkpoint `start`.

        Parameter groups are those of `decay_groups` unless given; a group's `lr_factor` multiplies its learning rate.
        `remark` turns the rows of all validations so far into a line for the user, or an empty string.
        Every validation also records the loss on each text in `also_validate_on`, by name; it decides nothing.
        The run stops early after `early_stopping_patience` validations without improvement; None: never.
        Only with `keep_best` are there weights at `best_path`.
        `after_step` is called with the number of steps taken. What it keeps for later ones, the model's buffers hold.

        Raises:
            DynarouteError: batches do not divide among the processes, there is not one whole batch, the run would end
                within its warm-up, or what `own_share` raises of a text to validate on.
        """
        processes = accelerator.num_processes
        if settings.batch_size % (settings.micro_batch_size * processes):
            raise DynarouteError(
                f"batch_size = {settings.batch_size} must be a multiple of micro_batch_size = "
                f"{settings.micro_batch_size} times the number of processes = {processes}"
            )
        for windows in (validation, *(also_validate_on or {}).values()):
            own_share(windows, accelerator)
        if settings.warmup_steps > total_steps:
            raise DynarouteError(
                f"warmup_steps = {settings.warmup_steps}: must be at most the {total_steps} steps that this run takes"
            )
        self.objective, self.settings, self.accelerator = objective, settings, accelerator
        self.training, self.validation = training, validation
        self.seed, self.scratch, self.start, self.remark = seed, scratch, start, remark
        self.also_validate_on = also_validate_on or {}
        self.early_stopping_patience, self.keep_best, self.after_step = early_stopping_patience, keep_best, after_step
        self.steps_per_epoch = steps_per_epoch(len(training), settings.batch_size)
        self.total_steps = total_steps
        self.validate_every = self.steps_per_epoch if settings.validate_every == "epoch" else settings.validate_every
        groups = decay_groups(model, settings.weight_decay) if parameter_groups is None else parameter_groups
        optimizer = AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), fused=True)
        # By default, accelerate decides on placement with the help of torch.distributed.tensor: an import of 0.7 s.
        prepared = accelerator.prepare(model, optimizer, device_placement=[True, True])
        self.unwrapped, (self.model, self.optimizer) = model, prepared  # accelerator.unwrap_model imports torch._dynamo
        self.state = TrainingState()
        self._epoch_order: tuple[int, np.ndarray] | None = None
        self.sums: dict[str, Tensor] = {}  # of training metrics since the last validation, float64
        # Spent on steps and on validations, by earlier processes of the run included.
        self.seconds = self.validation_seconds = 0.0

    def __enter__(self) -> "Trainer":
        """Takes the scratch folder, once no other run trains there, and resumes from the checkpoint in it, if any.

        Raises:
            DynarouteError: the checkpoint is damaged.
        """
        self._held = contextlib.ExitStack()
        if self.accelerator.is_main_process:
            self._held.enter_context(exclusive(self.scratch, while_waiting=lambda: self._any(False)))
        while not self._any(self.accelerator.is_main_process):  # a barrier would time out while the main process waits
            pass
        if self.last_path.exists():
            self._restore()
        elif self.start is not None:
            self._load_tensors(self.start)
        return self

    def __exit__(self, *_: object) -> None:
        """Releases the scratch folder."""
        self._held.close()

    def discard_scratch(self) -> None:
        """Removes the scratch folder; call it once the results are published."""
        if self.accelerator.is_main_process:
            discard(self.scratch)

    @property
    def last_path(self) -> Path:
        """The checkpoint to resume from: weights, optimizer, state."""
        return self.scratch / "last.safetensors"

    @property
    def best_path(self) -> Path:
        """The weights with the lowest validation loss."""
        return self.scratch / "best.safetensors"

    def run(self) -> TrainingState:
        """Trains to the end, or until validation stops improving.

        Raises:
            DynarouteError: the loss is no longer finite, or a signal asked to stop.
        """
        tokens_per_step = self.settings.batch_size * self.training.seq_len
        progress = tqdm(
            total=self.total_steps * tokens_per_step,
            initial=self.state.step * tokens_per_step,
            unit="tok",
            unit_scale=True,
            desc="train",
            disable=None if self.accelerator.is_main_process else True,  # None: shown on a terminal only
        )
        with StopRequest() as stop, progress:
            while True:
                if self._validation_is_due():
                    started = time.perf_counter()
                    self._validate(progress, stop)
                    self.validation_seconds += time.perf_counter() - started
                patience = self.early_stopping_patience
                if patience is not None and self.state.validations_without_improvement >= patience:
                    break
                if self.state.step == self.total_steps:
                    break
                started = time.perf_counter()
                loss = self._step()
                self.seconds += time.perf_counter() - started
                progress.update(tokens_per_step)
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                is_time = self.state.step % self.settings.checkpoint_every == 0 and not self._validation_is_due()
                agreed = self._agree(stop)
                if agreed or is_time:  # a validation saves by itself
                    self._save(agreed)
            self.accelerator.wait_for_everyone()
        return self.state

    def _step(self) -> float:
        """One optimizer step; returns this process's mean loss."""
        step, settings, accelerator = self.state.step, self.settings, self.accelerator
        epoch, position = divmod(step, self.steps_per_epoch)
        indices = self._order(epoch)[position * settings.batch_size : (position + 1) * settings.batch_size]
        # The same micro-batches, with the same draws, whatever the number of processes that share them out.
        micro_batches = indices.reshape(-1, settings.micro_batch_size)
        own = range(accelerator.process_index, len(micro_batches), accelerator.num_processes)
        self.model.train()
        total, earlier = 0.0, self.sums.get("loss", 0.0)
        for number in own:
            draw = np.random.SeedSequence([self.seed, step, 0, number])
            torch.manual_seed(int(draw.generate_state(1, np.uint64)[0] >> 1))
            with contextlib.nullcontext() if number == own[-1] else accelerator.no_sync(self.model):
                total += self._backward(micro_batches[number], step, len(own))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._diverged(f"step {step + 1}: loss {total}, gradient norm {float(norm)}")
        self._add("gradient_norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step) * group.get("lr_factor", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        if self.after_step:
            self.after_step(self.state.step)
        if step % LOSS_EVERY == 0:
            loss = float(accelerator.reduce(self.sums["loss"] - earlier, "mean"))
            self.state.losses.append({"step": self.state.step, "train_loss": loss})
        return total

    def _backward(self, windows: np.ndarray, step: int, parts: int) -> float:
        """Adds one of `parts` micro-batches to the gradients and metrics; its loss, divided by `parts`.

        Its graph is freed on return; otherwise the next micro-batch's would add to its memory.
        """
        loss, metrics = self.objective.loss(self.model, self._batch(self.training, windows), step)
        self.accelerator.backward(loss / parts)
        for name, value in metrics.items():
            self._add(name, value.detach() / parts)
        return loss.item() / parts

    def _diverged(self, what: str) -> NoReturn:
        good = f"{self.last_path} (step {self.saved_step})" if self.last_path.exists() else "none was written yet"
        raise DynarouteError(
            f"{what}: training diverged; the last good checkpoint is {good}; lower lr or clip_norm, or lengthen "
            "warmup_steps"
        )

    def _learning_rate(self, step: int) -> float:
        settings = self.settings
        return warmup_cosine(step, self.total_steps, settings.warmup_steps, settings.lr, settings.min_lr)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of the training windows in an epoch; kept, since drawing it for millions of windows takes long."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.training))
            self._epoch_order = (epoch, order)
        return self._epoch_order[1]

    def _batch(self, windows: WindowSet, indices: Iterable[int]) -> Batch:
        tokens, targets = windows.batch(indices)
        device = self.accelerator.device
        return Batch(tokens.to(device), targets.to(device), torch.as_tensor(indices, device=device))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().to(torch.float64)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _any(self, own: bool) -> bool:
        """Whether it holds for any process."""
        return bool(self.accelerator.gather(torch.tensor([int(own)], device=self.accelerator.device)).max())

    def _agree(self, stop: StopRequest) -> signal.Signals | None:
        """The signal that any process has received so far: all must stop after the same step.

        A later signal, such as one during a checkpoint, waits for the next call.
        """
        if self.accelerator.num_processes == 1:
            return stop.signal
        asked = torch.tensor([int(stop.signal or 0)], device=self.accelerator.device)
        asked = int(self.accelerator.gather(asked).max())
        return signal.Signals(asked) if asked else None

    def _validation_is_due(self) -> bool:
        step, history = self.state.step, self.state.history
        due = step % self.validate_every == 0 or step == self.total_steps
        return due and (not history or history[-1]["step"] != step)

    def _validate(self, progress: tqdm, stop: StopRequest) -> None:
        """Adds a row to the history, keeps the model if it is the best, and saves."""
        state, settings = self.state, self.settings
        sums = self.validation_sums(self.validation, stop)
        metrics = self.objective.validation_metrics(sums)
        if not math.isfinite(metrics["loss"]):
            self._diverged(f"step {state.step}: validation loss {metrics['loss']}")
        since = state.step - (state.history[-1]["step"] if state.history else 0)
        row = {"step": state.step, "epoch": state.step / self.steps_per_epoch}
        row["tokens"] = state.step * settings.batch_size * self.training.seq_len
        row["lr"] = self._learning_rate(state.step - 1) if state.step else 0.0
        row |= {f"validation_{name}": value for name, value in metrics.items()}
        for name, windows in self.also_validate_on.items():
            other = self.objective.validation_metrics(self.validation_sums(windows, stop))
            row[f"validation_{name}_loss"] = other["loss"]
        for name, value in sorted(self.sums.items()):
            row[f"train_{name}"] = float(self.accelerator.reduce(value, "mean")) / since
        self.sums = {}
        state.history.append(row)
        if metrics["loss"] < state.best_loss:
            state.best_step, state.best_loss, state.validations_without_improvement = state.step, metrics["loss"], 0
            if self.keep_best and self.accelerator.is_main_process:
                weights = self.unwrapped.state_dict()
                save_checkpoint(self.best_path, weights, {"step": state.step, "validation_loss": metrics["loss"]})
        else:
            state.validations_without_improvement += 1
        if self.accelerator.is_main_process:
            shown = {name: row[name] for name in ("train_loss", "validation_loss") if name in row}
            text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items())
            progress.write(f"step {state.step} of {self.total_steps}: {text}", file=sys.stderr)
            if self.remark and (remark := self.remark(state.history)):
                progress.write(f"step {state.step} of {self.total_steps}: {remark}", file=sys.stderr)
        self._save(self._agree(stop))

    @torch.no_grad()
    def validation_sums(self, windows: WindowSet, stop: StopRequest | None = None) -> dict[str, Tensor]:
        """The objective's sums over all windows, shared out among the processes and added up exactly once each."""
        accelerator = self.accelerator
        self.model.eval()
        own = own_share(windows, accelerator)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(own), self.settings.micro_batch_size):
            part = np.asarray(own[start : start + self.settings.micro_batch_size])
            for name, value in self.objective.validation_sums(
                self.model, self._batch(windows, part), self.state.step
            ).items():
                sums[name] = sums[name] + value if name in sums else value
            # Several processes would not notice in the same batch; they stop after the next step instead.
            if stop is not None and stop.signal and accelerator.num_processes == 1:
                self._save(stop.signal)
        return {name: accelerator.reduce(value, "sum").cpu() for name, value in sums.items()}

    def _save(self, stop: signal.Signals | None) -> None:
        """Writes the checkpoint to resume from; ends the run if a signal asked for it."""
        sums = {name: self.accelerator.gather(value.view(1)) for name, value in sorted(self.sums.items())}
        if self.accelerator.is_main_process:
            model = self.unwrapped
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                self._diverged(f"step {self.state.step}: weights that are not finite")
            tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
            optimizer = optimizer_tensors(model, self.optimizer)
            tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
            tensors |= {f"sums.{name}": value for name, value in sums.items()}
            save_checkpoint(self.last_path, tensors, self.state.to_json())
            timing = {"seconds": self.seconds, "validation_seconds": self.validation_seconds}
            write_json(self.scratch / "timing.json", timing)
        self.saved_step = self.state.step
        if stop:
            raise DynarouteError(
                f"stopped by {stop.name} at step {self.state.step} of {self.total_steps}; "
                f"the same command resumes there"
            )

    def _restore(self) -> None:
        """Resumes from the last checkpoint."""
        state, sums = self._load_tensors(self.last_path)
        accelerator = self.accelerator
        for name, value in sums.items():  # of every process
            own = value[accelerator.process_index] if len(value) == accelerator.num_processes else value.mean()
            self.sums[name] = own.to(accelerator.device)
        self.state = TrainingState.from_json(state)
        self.saved_step = self.state.step
        path = self.scratch / "timing.json"
        if path.exists():
            timing = read_record(path)
            self.seconds, self.validation_seconds = timing["seconds"], timing["validation_seconds"]

    def _load_tensors(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Loads weights and optimizer from a checkpoint; returns its state, and the sums in it."""
        tensors, state = load_checkpoint(path)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "sums": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        model = self.unwrapped
        load_weights(model, parts["model"], path)
        load_optimizer(model, self.optimizer.optimizer, parts["optimizer"])
        return state, parts["sums"]


def with_all_columns(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history's rows with the same columns: the one before the first step has no training metrics, but NaN."""
    columns = dict.fromkeys(name for row in history for name in row)
    return [{name: row.get(name, math.nan) for name in columns} for row in history]
