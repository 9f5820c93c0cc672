"""Cached against resident decoding: hit rates, speed and memory, with every logit checked.

Every text is read alone (batch 1), with an empty cache: its prompt in one pass, then the tokens that follow in the text
itself, one by one, since a small model's own continuation soon repeats one token, and with it a few experts. The page
cache is either warm, after all files have been read, or cold: before every pass the system drops pages not in use, so
that every miss comes from disk, as on a machine without spare memory.
"""

import itertools
import multiprocessing
import operator
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.config.dwr import BenchmarkCache, PolicyName, PrefetchName
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.mapping import drop_from_page_cache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics, nearest_a_third
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.dwr.inference import bind_experts, load_backbone, load_resident, read_text, routers
from dynaroute.dwr.windows import benchmark_windows
from dynaroute.errors import DynarouteError


class Cell(NamedTuple):
    """One setting of the benchmark."""

    capacity: int | None = None  # experts; None: all resident, no cache
    policy: PolicyName = "lru"
    prefetch: PrefetchName = "none"
    cold: bool = False  # the page cache


class Pass(NamedTuple):
    """Decoding of all texts once; seconds for each text."""

    prefill: CacheStatistics = CacheStatistics()
    decode: CacheStatistics = CacheStatistics()
    prefill_seconds: tuple[float, ...] = ()
    decode_seconds: tuple[float, ...] = ()
    inexact: int = 0  # texts with logits not equal to the resident model's to the bit, on a GPU


class Memory(NamedTuple):
    """Peaks over a decoding, in bytes. Only Linux distinguishes the kinds; elsewhere only the first is measured."""

    resident: int  # all physical memory of the process, Python and the libraries included
    anonymous: int | None  # allocated: the backbone, resident experts, activations
    mapped_experts: int | None  # pages of expert files; None: a cache of experts that shows none


def make_cells(settings: BenchmarkCache, num_experts: int) -> tuple[list[Cell], list[Cell]]:
    """Every capacity with every policy and prefetcher; and with a cold page cache, the capacity nearest a third of the
    experts with the first policy and every prefetcher.

    Raises:
        DynarouteError: a capacity is larger than the number of experts.
    """
    if max(settings.capacities) > num_experts:
        raise DynarouteError(
            f"params.yaml: benchmark_cache.capacities = {settings.capacities}: the model has {num_experts} experts in "
            "all"
        )
    third = nearest_a_third(num_experts, settings.capacities)
    warm = itertools.product(settings.capacities, settings.policies, settings.prefetchers)
    cold = [Cell(third, settings.policies[0], prefetch, cold=True) for prefetch in settings.prefetchers]
    return [Cell(*cell) for cell in warm], cold


def held_out_texts(store: ExpertStore, directory: Path, settings: BenchmarkCache) -> Tensor:
    """Prompts with their continuations [P, prompt_tokens + new_tokens], evenly spaced over a folder's test split.

    Raises:
        DynarouteError: it has too few tokens, or they are another tokenizer's than the model's.
    """
    shards = TokenShards(directory, "test")
    if shards.padded_vocab_size != store.config.vocab_size:
        model = f"the model in {store.path} one of {store.config.vocab_size}"
        raise DynarouteError(
            f"{directory}: has a vocabulary of {shards.padded_vocab_size}, {model}: train and export again"
        )
    tokens, _ = benchmark_windows(shards, settings).batch(range(settings.num_prompts))
    return tokens


def sweep(
    store: ExpertStore,
    texts: Tensor,
    prompt_tokens: int,
    cells: Sequence[Cell],
    lookahead: int,
    repeats: int,
    device: str = "cpu",
    selective: bool = True,
) -> dict[Cell, list[Pass]]:
    """Reads texts [P, T], of each `prompt_tokens` in one pass and the others one by one, `repeats` times in every cell.

    The resident model comes before the cells. All take turns at every text, so that changes of the machine's speed
    affect all of them alike. Unless the caches are selective, they follow every prediction, and decisions repeat.

    Raises:
        DynarouteError: logits that are not the resident model's, see `is_exact`.
    """
    resident, cached = load_resident(store, device), load_backbone(store, device)
    texts = texts.to(device)
    cells = [Cell(), *cells]
    passes: dict[Cell, list[Pass]] = {cell: [] for cell in cells}
    run_passes(read_text(resident, texts[:1, : prompt_tokens + 2], prompt_tokens))  # warm-up
    progress = tqdm(total=repeats * len(texts) * len(cells), desc="decoding", unit="cell", disable=None)
    for _ in range(repeats):
        total = dict.fromkeys(cells, Pass())
        for index, text in enumerate(texts.split(1)):
            for cell in cells:
                if cell.capacity is None:
                    result, reference = run_passes(read_text(resident, text, prompt_tokens))
                else:
                    prefetcher = make_prefetcher(cell.prefetch, store, routers(cached), lookahead)
                    policy = make_policy(cell.policy, store.usage.load)
                    with ExpertCache(
                        store, cell.capacity, policy, False, prefetcher, device, selective=selective
                    ) as cache:
                        bind_experts(cached, cache)
                        forget = forgetter(store.path) if cell.cold else None
                        result, logits = run_passes(read_text(cached, text, prompt_tokens), cache, forget)
                    if not is_exact(logits, reference, device, f"{cell}: logits of text {index}"):
                        result = result._replace(inexact=1)
                total[cell] = Pass(*map(operator.add, total[cell], result))
                progress.update()
        for cell in cells:
            passes[cell].append(total[cell])
    progress.close()
    return passes


def is_exact(logits: Tensor, reference: Tensor, device: str, what: str) -> bool:
    """Whether logits [1, T, V] are the resident model's to the last bit.

    Raises:
        DynarouteError: they are not, on the CPU; or the most probable token of a position differs, on a GPU, where a
            library may choose another kernel for the same product.
    """
    exact = torch.equal(logits, reference)
    if not exact and (device == "cpu" or not torch.equal(logits.argmax(-1), reference.argmax(-1))):
        raise DynarouteError(f"{what} are not those of the resident model")
    return exact


def run_passes(
    passes: Iterator[Tensor],
    cache: ExpertCache | None = None,
    before_pass: Callable[[], None] | None = None,
) -> tuple[Pass, Tensor]:
    """Times the forward passes of decoding, the first of them over the prompt; also returns all logits [1, T, V].

    Args:
        passes: yields the logits of each.
        cache: of the model.
        before_pass: called before each of them, and not timed.
    """
    logits, seconds, statistics = [], [], []
    while True:
        if before_pass:
            before_pass()
        started = time.perf_counter()
        if (output := next(passes, None)) is None:
            break
        logits.append(output)
        if output.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        statistics.append(cache.take_statistics() if cache else CacheStatistics())
    decoding = sum(statistics[1:], CacheStatistics())
    return Pass(statistics[0], decoding, (seconds[0],), (sum(seconds[1:]),)), torch.cat(logits, dim=1)


def forgetter(folder: Path) -> Callable[[], None]:
    """A function that drops the unmapped pages of a folder's files from the page cache."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def forget() -> None:
        for path in files:
            drop_from_page_cache(path)

    return forget


def peak_memory(store: Path, texts: Tensor, prompt_tokens: int, capacities: list[int]) -> dict[Cell, Memory]:
    """The peak memory of reading the first text, after loading, each in a fresh process: with all experts resident,
    and with caches of the given capacities."""
    context = multiprocessing.get_context("forkserver")  # whose processes start with torch imported and nothing run
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        arguments = (store, texts[:1].tolist(), prompt_tokens, torch.get_num_threads())
        return {
            Cell(capacity): processes.submit(_measure_memory, *arguments, capacity).result()
            for capacity in (None, *capacities)
        }


def _measure_memory(
    path: Path, text: list[list[int]], prompt_tokens: int, num_threads: int, capacity: int | None
) -> Memory:
    """Runs in a fresh process."""
    torch.set_num_threads(num_threads)
    store = ExpertStore(path)
    if capacity is None:
        model = load_resident(store)
    else:
        model = load_backbone(store)
        bind_experts(model, ExpertCache(store, capacity))
    # Links are resolved: DVC may have put the files into its cache, and maps are named by the file itself.
    experts = {str(file.resolve()) for file in path.glob("expert_*.safetensors")}
    process, samples, mapped = psutil.Process(), [], []
    for step, _ in enumerate(read_text(model, torch.tensor(text), prompt_tokens)):
        samples.append(process.memory_info())
        if sys.platform == "linux" and step % 8 == 0:  # it takes longer than a step
            mapped.append(sum(entry.rss for entry in process.memory_maps() if entry.path in experts))
    resident = max(sample.rss for sample in samples)
    if sys.platform != "linux":
        return Memory(resident, None, None)
    anonymous = max(sample.rss - sample.shared for sample in samples)
    # A cache maps what it holds: zero means that the maps were not recognised, or that weights are decoded copies.
    mapped_experts = max(mapped) if capacity is None else max(mapped) or None
    return Memory(resident, anonymous, mapped_experts)
