"""Reads held-out text token by token on a GPU with some of the experts on it, against all of them resident.

    python benchmarks/benchmark_gpu_cache.py        (`make gpu` runs it in gpu/)

The other experts are in the GPU's host memory, page-locked; or in their files, which the page cache holds or, cold,
does not. Every capacity with every policy and prefetcher, at batch 1 in fp32; cold, the capacity nearest a third of the
experts with the first policy. A most probable token that is not the resident model's stops the stage, and it is
recorded whether all logits are equal to the bit. With `device: cpu` nothing is copied, which is good for tests alone.

Reads   data/dwr/expert_store, data/tokens/<dwr.corpus>
Writes  reports/benchmarks/gpu_cache.json
"""

from pathlib import Path
from statistics import median
from typing import Any

import torch

from dynaroute.analysis.cache_benchmark import Cell, Pass, held_out_texts, make_cells, sweep
from dynaroute.config import Settings
from dynaroute.dwr.experts.residency import nearest_a_third
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.machine import describe_machine, require_device
from dynaroute.pipeline.stage import run

STORE = Path("data/dwr/expert_store")


def main(settings: Settings) -> None:
    """Measures and writes the report."""
    require_device(settings.device)
    torch.set_num_threads(settings.num_threads)
    benchmark, store = settings.benchmark_cache, ExpertStore(STORE)
    warm, cold = make_cells(benchmark, store.num_experts)
    texts = held_out_texts(store, Path("data/tokens") / settings.dwr.corpus, benchmark)
    store.verify()
    arguments = (benchmark.lookahead, benchmark.repeats, settings.device)
    from_disk = sweep(store, texts, benchmark.prompt_tokens, [*warm, *cold], *arguments)
    store.hold_in_memory()
    from_memory = sweep(store, texts, benchmark.prompt_tokens, warm, *arguments)
    rows = [
        row("disk, cold" if cell.cold else place, cell, results, passes[Cell()], benchmark.new_tokens)
        for place, passes in (("host memory", from_memory), ("disk", from_disk))
        for cell, results in passes.items()
        if cell.capacity
    ]
    every = [one for passes in (from_memory, from_disk) for results in passes.values() for one in results]
    resident = [
        benchmark.new_tokens / seconds
        for passes in (from_memory, from_disk)
        for one in passes[Cell()]
        for seconds in one.decode_seconds
    ]
    write_json(
        "reports/benchmarks/gpu_cache.json",
        {
            "run": store.run,
            "experts": store.num_experts,
            "expert_bytes": store.expert_bytes,
            "capacity_nearest_a_third": nearest_a_third(store.num_experts, benchmark.capacities),
            "prompts": benchmark.num_prompts,
            "prompt_tokens": benchmark.prompt_tokens,
            "new_tokens": benchmark.new_tokens,
            "repeats": benchmark.repeats,
            "lookahead": benchmark.lookahead,
            "resident_tokens_per_second": median(resident),
            "resident_tokens_per_second_range": [min(resident), max(resident)],
            "rows": rows,
            "decodings": len(rows) * benchmark.repeats * benchmark.num_prompts,
            "decodings_with_a_logit_not_equal_to_the_bit": sum(one.inexact for one in every),
            "machine": describe_machine(settings.device),
        },
    )


def row(place: str, cell: Cell, results: list[Pass], resident: list[Pass], new_tokens: int) -> dict[str, Any]:
    """Medians over all decodings in a cell; a ratio is to the resident model's of the same text, seconds away."""
    own, theirs = ([seconds for one in passes for seconds in one.decode_seconds] for passes in (results, resident))
    ratios = [other / seconds for seconds, other in zip(own, theirs, strict=True)]
    decoded = new_tokens * len(results[0].decode_seconds)  # tokens of one repeat
    exact = results[0].decode  # the same in every repeat, but for what depends on speed
    return {
        "experts_in": place,
        "capacity": cell.capacity,
        "policy": cell.policy,
        "prefetch": cell.prefetch,
        "tokens_per_second": new_tokens / median(own),
        "ratio_to_resident": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "hit_rate": exact.hit_rate,
        "reads_per_token": median(one.decode.reads for one in results) / decoded,
        "stall_ms_per_token": 1e3 * median(one.decode.wait_seconds for one in results) / decoded,
        "late": median(one.decode.late for one in results),
    }


if __name__ == "__main__":
    run(main, __doc__)
