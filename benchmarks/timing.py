"""Times candidates that take turns, so that whatever else the machine does slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: str, what: str
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round after the warm-up.

    `what` names the work in the progress bar.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(warm_up + rounds), desc=what, unit="round", disable=None):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return {name: values[warm_up:] for name, values in times.items()}


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one call, with what it queued on the device."""
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def quartiles(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and the quartiles beside it."""
    low, median, high = statistics.quantiles(values, n=4)
    return median, [low, high]


def ratio(ones: Sequence[float], others: Sequence[float]) -> tuple[float, list[float]]:
    """Median and quartiles of the ratio of two times of the same round."""
    return quartiles([one / other for one, other in zip(ones, others, strict=True)])


def failure(step: Callable[[], object]) -> str | None:
    """Runs a step that a benchmark can do without; returns why it failed in one line, or None.

    Memory may be too small for it on a GPU, and a compiler fails in ways that have no common base class.
    """
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
