"""Cached against resident decoding: hit rates, speed and memory, with every logit checked on the way.

Every prompt is decoded alone (batch 1), and meets a cache that is empty or, with a warm start, filled by frequency.
"""

import multiprocessing
import operator
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from dynaroute.dwr.experts import CacheStatistics, ExpertCache, ExpertStore
from dynaroute.dwr.inference import bind_experts, greedy_decode, load_cached, load_resident
from dynaroute.dwr.model import DWRTransformer
from dynaroute.errors import DynarouteError


class Cell(NamedTuple):
    """One setting of the benchmark."""

    capacity: int | None = None  # experts; None: all resident, no cache
    warm_start: bool = False


class Pass(NamedTuple):
    """What decoding the prompts once took; seconds for each prompt."""

    prefill: CacheStatistics = CacheStatistics()
    decode: CacheStatistics = CacheStatistics()
    warm_start_bytes: int = 0
    prefill_seconds: tuple[float, ...] = ()
    decode_seconds: tuple[float, ...] = ()


class Memory(NamedTuple):
    """Peaks over a decoding, in bytes. Where the system does not tell the kinds apart, only the first is there."""

    resident: int  # all physical memory of the process, Python and the libraries included
    anonymous: int | None  # allocated: the backbone, resident experts, activations
    file_backed: int | None  # pages of mapped files: experts of a cache, code of libraries
    mapped_experts: int | None  # of these, pages of expert files


def sweep(
    store: ExpertStore, prompts: Tensor, steps: int, capacities: list[int], repeats: int
) -> dict[Cell, list[Pass]]:
    """Decodes `steps` tokens after each prompt [P, T] in every cell, `repeats` times.

    The first cell is the resident model; each capacity has a cold and a warm start. Cells take turns at every prompt,
    so that a machine whose speed drifts is equally slow for all of them.

    Raises:
        DynarouteError: logits that are not the resident model's to the last bit.
    """
    resident, cached = load_resident(store), load_cached(ExpertCache(store, 1))
    for model in (resident, cached):
        _decode(model, prompts[:1], 2)  # what is slow for the first time only
    cells = [Cell(), *(Cell(capacity, warm) for capacity in capacities for warm in (False, True))]
    passes: dict[Cell, list[Pass]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        total = dict.fromkeys(cells, Pass())
        for index, prompt in enumerate(prompts.split(1)):
            for cell in cells:
                if cell.capacity is None:
                    result, reference = _decode(resident, prompt, steps)
                else:
                    result, logits = _decode_cached(cached, ExpertCache(store, cell.capacity), cell, prompt, steps)
                    if not torch.equal(logits, reference):
                        raise DynarouteError(f"{cell}: logits of prompt {index} are not those of the resident model")
                total[cell] = Pass(*map(operator.add, total[cell], result))
        for cell in cells:
            passes[cell].append(total[cell])
    return passes


def peak_memory(store: Path, prompts: Tensor, steps: int, capacities: list[int]) -> dict[Cell, Memory]:
    """The peak memory of decoding the first prompt, after loading, each in a fresh process: with all experts resident,
    and with caches of the given capacities that start cold."""
    context = multiprocessing.get_context("forkserver")  # whose processes start with torch imported and nothing run
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        arguments = (store, prompts[:1].tolist(), steps, torch.get_num_threads())
        return {
            Cell(capacity): processes.submit(_measure_memory, *arguments, capacity).result()
            for capacity in (None, *capacities)
        }


def _decode_cached(
    model: DWRTransformer, cache: ExpertCache, cell: Cell, prompt: Tensor, steps: int
) -> tuple[Pass, Tensor]:
    bind_experts(model, cache)
    if cell.warm_start:
        cache.warm_start(cache.store.expert_load)
    warm_start_bytes = cache.take_statistics().bytes_read
    result, logits = _decode(model, prompt, steps, cache)
    return result._replace(warm_start_bytes=warm_start_bytes), logits


def _decode(model: DWRTransformer, prompt: Tensor, steps: int, cache: ExpertCache | None = None) -> tuple[Pass, Tensor]:
    """What it took, and all logits [1, T + steps, V]."""
    started = time.perf_counter()
    outputs = greedy_decode(model, prompt, steps)
    logits = [next(outputs)]
    prefilled = time.perf_counter()
    prefill = cache.take_statistics() if cache else CacheStatistics()
    logits.extend(outputs)
    ended = time.perf_counter()
    decode = cache.take_statistics() if cache else CacheStatistics()
    result = Pass(prefill, decode, prefill_seconds=(prefilled - started,), decode_seconds=(ended - prefilled,))
    return result, torch.cat(logits, dim=1)


def _measure_memory(path: Path, prompt: list[list[int]], steps: int, num_threads: int, capacity: int | None) -> Memory:
    """Runs in a process of its own."""
    torch.set_num_threads(num_threads)
    store = ExpertStore(path)
    model = load_resident(store) if capacity is None else load_cached(ExpertCache(store, capacity))
    process, samples, mapped = psutil.Process(), [], []
    for step, _ in enumerate(greedy_decode(model, torch.tensor(prompt), steps)):
        samples.append(process.memory_info())
        if sys.platform == "linux" and step % 8 == 0:  # it takes longer than a step
            mapped.append(_mapped_bytes(process, path))
    resident = max(sample.rss for sample in samples)
    if sys.platform != "linux":
        return Memory(resident, None, None, None)
    anonymous = max(sample.rss - sample.shared for sample in samples)
    return Memory(resident, anonymous, max(sample.shared for sample in samples), max(mapped))


def _mapped_bytes(process: psutil.Process, folder: Path) -> int:
    """Pages of the files in a folder that are mapped and resident."""
    prefix = str(folder.resolve()) + os.sep
    return sum(entry.rss for entry in process.memory_maps() if entry.path.startswith(prefix))
