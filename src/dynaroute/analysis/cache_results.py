"""Tables of the cache benchmark: decisions, which repeat exactly, and measurements; and its checks."""

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from dynaroute.analysis.cache_benchmark import Cell, Memory, Pass
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.pipeline.machine import describe_machine


def checks(passes: dict[Cell, list[Pass]]) -> dict[str, bool | None]:
    """Whether counts add up; None where nothing was measured."""
    cached = {cell: results for cell, results in passes.items() if cell.capacity}
    return {
        "logits_are_equal_to_the_bit_in_every_cell": True,  # the sweep raises otherwise
        "every_repeat_has_the_same_hits_and_misses": every(
            (one.prefill, one.decode) == (first.prefill, first.decode)
            for cell, (first, *others) in cached.items()
            for one in others
            if cell.prefetch == "none"  # which predictions are worth following depends on times
        ),
        "without_prefetching_every_miss_is_one_read": every(
            (part.reads, part.reads_ahead) == (part.misses, 0)
            for cell, results in cached.items()
            if cell.prefetch == "none"
            for one in results
            for part in (one.prefill, one.decode)
        ),
    }


def every(outcomes: Iterable[bool]) -> bool | None:
    """Whether a check holds in all cases; None without any: nothing was measured."""
    found = list(outcomes)
    return all(found) if found else None


def exact_row(store: ExpertStore, cell: Cell, result: Pass) -> dict[str, Any]:
    """Decisions of a cache over all texts: the same on every run."""
    both = result.prefill + result.decode
    return {
        "capacity": cell.capacity,
        "share_of_experts": cell.capacity / store.num_experts,
        "policy": cell.policy,
        "prefetch": cell.prefetch,
        "prefill_requests": result.prefill.requests,
        "prefill_hit_rate": result.prefill.hit_rate,
        "decode_requests": result.decode.requests,
        "decode_hit_rate": result.decode.hit_rate,
        "misses": both.misses,
        "evictions": both.evictions,
        "accuracy": result.decode.accuracy if result.decode.predicted else None,
        "prefetched": both.prefetched,
        "prefetch_evictions": both.prefetch_evictions,
    }


def timing_row(
    store: ExpertStore, cell: Cell, results: list[Pass], resident: list[Pass], new_tokens: int, memory: Memory | None
) -> dict[str, Any]:
    """Decoding speed, reads, and peak memory, which is measured with LRU only; without a capacity, all are resident.

    A repeat's speed is the median over its texts, and so is its ratio to the resident model, of pairs decoded within
    seconds of each other. Rows give the median over repeats and their range; of reads the mean, so that they add up.
    """
    speeds = [median(new_tokens / seconds for seconds in one.decode_seconds) for one in results]
    ratios = [
        median(theirs / ours for ours, theirs in zip(one.decode_seconds, other.decode_seconds, strict=True))
        for one, other in zip(results, resident, strict=True)
    ]
    cached = cell.capacity is not None
    totals = [one.prefill + one.decode for one in results]
    experts = {
        "read": [total.reads for total in totals],
        "read_ahead": [total.reads_ahead for total in totals],
        "useful": [total.used_ahead for total in totals],
        "late": [total.late for total in totals],
        "wasted": [total.reads_ahead - total.used_ahead for total in totals],
    }
    return {
        "capacity": cell.capacity,
        "policy": cell.policy if cached else None,
        "prefetch": cell.prefetch if cached else None,
        "page_cache": ("cold" if cell.cold else "warm") if cached else None,
        "hit_rate": median(one.decode.hit_rate for one in results) if cached else None,
        "tokens_per_second": median(speeds),
        "tokens_per_second_lowest": min(speeds),
        "tokens_per_second_highest": max(speeds),
        "ratio_to_resident": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "wait_share": median(one.decode.wait_seconds / sum(one.decode_seconds) for one in results),
        **{f"bytes_{name}": fmean(counts) * store.file_bytes for name, counts in experts.items()},
        "prefill_seconds": median(seconds for one in results for seconds in one.prefill_seconds),
        "peak_memory_bytes": memory and memory.resident,
        "peak_anonymous_bytes": memory and memory.anonymous,
        "peak_mapped_expert_bytes": memory and memory.mapped_experts,
    }


def timing_summary(store: ExpertStore, memory: dict[Cell, Memory], repeats: int) -> dict[str, Any]:
    """On which machine, how often, and whether memory stayed within the capacity where the system tells."""
    file_pages = -(-store.file_bytes // 4096) * 4096
    mapped = {cell.capacity: found.mapped_experts for cell, found in memory.items() if cell.capacity}
    held = None
    if None not in mapped.values():
        held = every(found <= capacity * file_pages for capacity, found in mapped.items())
    checks = {"no_more_experts_are_in_memory_than_the_capacity": held}
    return {"run": store.run, "repeats": repeats, "checks": checks, "machine": describe_machine("cpu")}
