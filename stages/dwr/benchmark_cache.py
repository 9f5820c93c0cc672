"""Reads held-out text token by token with the experts in caches, compared with all of them resident.

    python stages/dwr/benchmark_cache.py

Every capacity with every policy and prefetcher. Every logit of every cell must equal the resident model's to the bit,
or the stage fails. Always on the CPU.

Reads   data/dwr/expert_store, data/tokens/<dwr.corpus>
Writes  data/dwr/cache/           cells.csv: hit rates, evictions and prefetches of each cell; summary.json
        data/dwr/measured/cache/  cells.csv: speed, waiting, reads and memory of each cell; summary.json
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from dynaroute.analysis.cache_benchmark import (
    Cell,
    Memory,
    Pass,
    held_out_texts,
    make_cells,
    peak_memory,
    run_passes,
    sweep,
)
from dynaroute.config import Settings
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.prefetch import GatePrefetcher
from dynaroute.dwr.experts.residency import nearest_a_third
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.dwr.inference import bind_experts, load_backbone, read_text, routers
from dynaroute.pipeline.artifacts import output_directory, write_csv, write_json
from dynaroute.pipeline.machine import describe_machine
from dynaroute.pipeline.stage import run

STORE = Path("data/dwr/expert_store")


def main(settings: Settings) -> None:
    """Runs the grid; writes exact results and measurements to separate files."""
    torch.set_num_threads(settings.num_threads)
    benchmark = settings.benchmark_cache
    store = ExpertStore(STORE)
    warm, cold = make_cells(benchmark, store.num_experts)
    third = nearest_a_third(store.num_experts, benchmark.capacities)
    texts = held_out_texts(store, Path("data/tokens") / settings.dwr.corpus, benchmark)
    store.verify()
    passes = sweep(store, texts, benchmark.prompt_tokens, [*warm, *cold], benchmark.lookahead, benchmark.repeats)
    memory = peak_memory(STORE, texts, benchmark.prompt_tokens, benchmark.capacities)

    control = control_accuracy(store, texts[:1], benchmark.prompt_tokens)

    rows = [exact_row(store, cell, passes[cell][0]) for cell in warm]
    cached = {cell: results for cell, results in passes.items() if cell.capacity}
    checks = {
        "logits_are_equal_to_the_bit_in_every_cell": True,  # the sweep raises otherwise
        "hits_and_misses_add_up_to_requests": every(
            part.hits + part.misses == part.requests
            for results in cached.values()
            for one in results
            for part in (one.prefill, one.decode)
        ),
        "every_repeat_has_the_same_hits_and_misses": every(
            (one.prefill, one.decode) == (first.prefill, first.decode)
            for first, *others in cached.values()
            for one in others
        ),
        "without_prefetching_every_miss_is_one_read": every(
            (part.reads, part.reads_ahead) == (part.misses, 0)
            for cell, results in cached.items()
            if cell.prefetch == "none"
            for one in results
            for part in (one.prefill, one.decode)
        ),
        "a_prediction_without_staleness_is_always_right": control == 1,
    }
    with output_directory("data/dwr/cache") as folder:
        write_csv(folder / "cells.csv", rows)
        write_json(
            folder / "summary.json",
            {
                "run": store.run,
                "prompts": benchmark.num_prompts,
                "prompt_tokens": benchmark.prompt_tokens,
                "new_tokens": benchmark.new_tokens,
                "experts": store.num_experts,
                "expert_file_bytes": store.file_bytes,
                "lookahead": benchmark.lookahead,
                "capacity_nearest_a_third": third,
                "checks": checks,
            },
        )
    timing = [
        timing_row(store, cell, results, passes[Cell()], benchmark.new_tokens, memory.get(cell))
        for cell, results in passes.items()
    ]
    with output_directory("data/dwr/measured/cache") as folder:
        write_csv(folder / "cells.csv", timing)
        write_json(folder / "summary.json", timing_summary(store, memory, benchmark.repeats))


def every(outcomes: Iterable[bool]) -> bool | None:
    """Whether a check holds in all cases; None without any: nothing was measured."""
    found = list(outcomes)
    return all(found) if found else None


def control_accuracy(store: ExpertStore, text: torch.Tensor, prompt_tokens: int) -> float:
    """The accuracy of a prefetcher that predicts the router's own choice: it shows that accuracy is counted rightly."""
    model = load_backbone(store)
    control = GatePrefetcher(routers(model), store.config.top_k, ahead=0)
    with ExpertCache(store, store.num_experts, prefetcher=control) as cache:
        bind_experts(model, cache)
        result, _ = run_passes(read_text(model, text, prompt_tokens), cache)
    return result.decode.accuracy


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
        "peak_file_backed_bytes": memory and memory.file_backed,
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


if __name__ == "__main__":
    run(main, __doc__)
