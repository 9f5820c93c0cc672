"""Times candidates in turns, so that other load on the machine slows all of them alike."""

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from dynaroute.config.training import Training
from dynaroute.training.loop import Batch
from dynaroute.training.schedules import decay_groups

Key, Result = TypeVar("Key", bound=Hashable), TypeVar("Result")


def turns(
    candidates: Mapping[Key, Callable[[], Result]], rounds: int, warm_up: int, what: str
) -> dict[Key, list[Result]]:
    """The results of every candidate, one per round after the warm-up. `what` names the work in the progress bar."""
    found: dict[Key, list[Result]] = {name: [] for name in candidates}
    for _ in tqdm(range(warm_up + rounds), desc=what, unit="round", disable=None):
        for name, candidate in candidates.items():
            found[name].append(candidate())
    return {name: results[warm_up:] for name, results in found.items()}


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: str, what: str
) -> dict[str, list[float]]:
    """Seconds of every step in every round after the warm-up."""
    timed = {name: functools.partial(seconds, step, device) for name, step in steps.items()}
    return turns(timed, rounds, warm_up, what)


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one call, including the work it queued on the device."""
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and the lower and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, [low, high]


def columns(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median as column `name`, and the quartiles as column `name_quartiles`."""
    median, found = quartiles(values)
    return {name: median, f"{name}_quartiles": found}


def milliseconds(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of seconds, in milliseconds."""
    return columns("milliseconds", [1e3 * value for value in values])


def ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """The ratios of two times of the same round."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def show(rows: Sequence[Mapping[str, Any]], *names: str) -> None:
    """Prints some columns of a table."""
    print(pd.DataFrame(rows, columns=list(names)).to_string(index=False, float_format="{:.4g}".format))


def training_step(
    model: nn.Module, objective: Any, batches: Sequence[Batch], training: Training, accelerator: Accelerator
) -> Callable[[], None]:
    """One optimizer step on batches, as the training loop takes it."""
    groups = decay_groups(model, training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=training.lr, betas=tuple(training.betas), fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    def step() -> None:
        for batch in batches:
            accelerator.backward(objective.loss(model, batch, 0)[0] / len(batches))
        accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def failure(step: Callable[[], object]) -> str | None:
    """Runs a step that may fail without ending the benchmark; returns the reason in one line, or None.

    A GPU's memory may be too small, and compilers raise errors without a common base class.
    """
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
