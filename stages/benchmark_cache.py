"""Decodes held-out text with the experts in caches of several sizes, against all of them resident.

    python stages/benchmark_cache.py

Every logit of every cell is compared with the resident model's to the bit; one that differs stops the stage. On the
CPU, whatever `device` says.

Reads   data/dwr/expert_store, data/tokens/<dwr.corpus>
Writes  reports/dwr/cache.csv          hit rates, evictions and bytes read for each capacity, cold and warm start
        reports/dwr/cache.json         summary metrics and checks
        reports/dwr/cache_timing.csv   what was measured: speed and memory, also of the resident model
        reports/dwr/cache_timing.json  its summary and checks, and the machine
"""

from pathlib import Path
from statistics import median
from typing import Any

import torch

from dynaroute.artifacts import write_csv, write_json
from dynaroute.config import Settings
from dynaroute.data.shards import TokenShards, Windows
from dynaroute.dwr.benchmark import Cell, Memory, Pass, peak_memory, sweep
from dynaroute.dwr.experts import ExpertStore
from dynaroute.errors import DynarouteError
from dynaroute.machine import describe_machine
from dynaroute.stage import run

STORE = Path("data/dwr/expert_store")
REPORTS = Path("reports/dwr")


def main(settings: Settings) -> None:
    """Runs the sweep and writes what is exact apart from what is measured."""
    torch.set_num_threads(settings.num_threads)
    benchmark = settings.benchmark_cache
    store = ExpertStore(STORE)
    if max(benchmark.capacities) > store.num_experts:
        raise DynarouteError(
            f"params.yaml: benchmark_cache.capacities = {benchmark.capacities}: the model has "
            f"{store.num_experts} experts in all"
        )
    prompts = held_out_prompts(settings, store.config.vocab_size)
    passes = sweep(store, prompts, benchmark.new_tokens, benchmark.capacities, benchmark.repeats)
    memory = peak_memory(STORE, prompts, benchmark.new_tokens, benchmark.capacities)

    rows = [exact_row(store, cell, results[0]) for cell, results in passes.items() if cell.capacity is not None]
    third = min(benchmark.capacities, key=lambda capacity: abs(capacity - store.num_experts / 3))
    cold_third = next(row for row in rows if row["capacity"] == third and not row["warm_start"])
    statistics = [part for results in passes.values() for one in results for part in (one.prefill, one.decode)]
    checks = {
        "logits_are_equal_to_the_bit_at_every_capacity": True,  # or the sweep would have raised
        "hits_and_misses_add_up_to_requests": all(s.hits + s.misses == s.requests for s in statistics),
        "every_repeat_has_the_same_hits_and_misses": all(
            (one.prefill, one.decode) == (results[0].prefill, results[0].decode)
            for results in passes.values()
            for one in results
        ),
    }
    write_csv(REPORTS / "cache.csv", rows)
    write_json(
        REPORTS / "cache.json",
        {
            "run": store.run,
            "prompts": benchmark.num_prompts,
            "prompt_tokens": benchmark.prompt_tokens,
            "new_tokens": benchmark.new_tokens,
            "experts": store.num_experts,
            "expert_bytes": store.expert_bytes,
            "capacity_nearest_a_third": third,
            "decode_hit_rate_at_a_third": cold_third["decode_hit_rate"],
            "checks": checks,
        },
    )
    timing = [
        timing_row(cell, results, passes[Cell()], benchmark.new_tokens, memory.get(cell))
        for cell, results in passes.items()
    ]
    write_csv(REPORTS / "cache_timing.csv", timing)
    write_json(REPORTS / "cache_timing.json", timing_summary(store, timing, third, benchmark.repeats))


def held_out_prompts(settings: Settings, vocab_size: int) -> torch.Tensor:
    """Prompts [P, T] spread evenly over the test split.

    Raises:
        DynarouteError: it has too few tokens, or they are another tokenizer's than the model's.
    """
    benchmark = settings.benchmark_cache
    directory = Path("data/tokens") / settings.dwr.corpus
    shards = TokenShards(directory, "test")
    if shards.padded_vocab_size != vocab_size:
        found = f"a vocabulary of {shards.padded_vocab_size}, the model in {STORE} one of {vocab_size}"
        raise DynarouteError(f"{directory}: has {found}: train and export again")
    windows = Windows(shards, benchmark.prompt_tokens, keep_tail=False)
    if len(windows) < benchmark.num_prompts:
        raise DynarouteError(
            f"params.yaml: benchmark_cache.num_prompts = {benchmark.num_prompts}: the test split of {directory} "
            f"has {len(windows)} windows of {benchmark.prompt_tokens} tokens"
        )
    tokens, _ = windows.batch([len(windows) * index // benchmark.num_prompts for index in range(benchmark.num_prompts)])
    return tokens


def exact_row(store: ExpertStore, cell: Cell, result: Pass) -> dict[str, Any]:
    """What a cache did over all prompts: the same on every run."""
    return {
        "capacity": cell.capacity,
        "share_of_experts": cell.capacity / store.num_experts,  # also the hit rate of uniform, independent routing
        "warm_start": cell.warm_start,
        "prefill_requests": result.prefill.requests,
        "prefill_hit_rate": result.prefill.hit_rate,
        "decode_requests": result.decode.requests,
        "decode_hit_rate": result.decode.hit_rate,
        "evictions": result.prefill.evictions + result.decode.evictions,
        "bytes_read": result.warm_start_bytes + result.prefill.bytes_read + result.decode.bytes_read,
        "expert_bytes_held": cell.capacity * store.expert_bytes,
    }


def timing_row(
    cell: Cell, results: list[Pass], resident: list[Pass], new_tokens: int, memory: Memory | None
) -> dict[str, Any]:
    """Decoding speed, and peak memory, which is measured with cold starts only; no capacity: all resident.

    A repeat's speed is the median over its prompts, and so is its ratio to the resident model, of pairs that were
    decoded within seconds of one another. Rows give the median over repeats, and their range.
    """
    speeds = [median(new_tokens / seconds for seconds in one.decode_seconds) for one in results]
    ratios = [
        median(theirs / ours for ours, theirs in zip(one.decode_seconds, other.decode_seconds, strict=True))
        for one, other in zip(results, resident, strict=True)
    ]
    return {
        "capacity": cell.capacity,
        "warm_start": None if cell.capacity is None else cell.warm_start,
        "tokens_per_second": median(speeds),
        "tokens_per_second_lowest": min(speeds),
        "tokens_per_second_highest": max(speeds),
        "ratio_to_resident": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "prefill_seconds": median(seconds for one in results for seconds in one.prefill_seconds),
        "peak_memory_bytes": memory and memory.resident,
        "peak_anonymous_bytes": memory and memory.anonymous,
        "peak_file_backed_bytes": memory and memory.file_backed,
        "peak_mapped_expert_bytes": memory and memory.mapped_experts,
    }


def timing_summary(store: ExpertStore, timing: list[dict[str, Any]], third: int, repeats: int) -> dict[str, Any]:
    """The resident model and a third of its experts side by side."""
    resident = timing[0]
    cached = next(row for row in timing if row["capacity"] == third and not row["warm_start"])
    file_pages = -(-(STORE / "expert_layer0_id0.safetensors").stat().st_size // 4096) * 4096
    mapped = {row["capacity"]: row["peak_mapped_expert_bytes"] for row in timing[1:] if not row["warm_start"]}
    names = ("tokens_per_second", "peak_memory_bytes", "peak_anonymous_bytes", "peak_mapped_expert_bytes")
    summary: dict[str, Any] = {
        "run": store.run,
        "repeats": repeats,
        "resident": {name: resident[name] for name in names},
        "at_a_third_of_the_experts": {
            "capacity": third,
            "ratio_to_resident": cached["ratio_to_resident"],
            **{name: cached[name] for name in names},
        },
        "checks": {},
        "machine": describe_machine("cpu"),
    }
    if None not in mapped.values():
        summary["checks"]["no_more_experts_are_in_memory_than_the_capacity"] = all(
            found <= capacity * file_pages for capacity, found in mapped.items()
        )
    return summary


if __name__ == "__main__":
    run(main, __doc__)
