"""Reads held-out text token by token on a GPU with some of the experts on it, against all of them resident.

    python benchmarks/benchmark_gpu_cache.py        (`make scale NAME=gpu` runs it at the published sizes)

The other experts are in page-locked host memory, or in their files, which the page cache holds (disk) or not (disk,
cold). Every capacity with every policy and prefetcher, at batch 1 in fp32; cold only the capacity nearest a third of
the experts with the first policy. The stage fails where the most probable token differs from the resident model's, and
records how many decodings had a logit that differs in its last bits. `device: cpu` copies nothing; it is for tests.

Reads   data/dwr/expert_store, data/tokens/<dwr.corpus>
Writes  reports/benchmarks/gpu_cache.json
"""

from pathlib import Path
from statistics import median

import torch

from dynaroute.analysis.cache_benchmark import Cell, held_out_texts, make_cells, sweep
from dynaroute.analysis.cache_results import timing_row
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
    places = (("host memory", from_memory), ("disk", from_disk))
    rows = [
        {
            "experts_in": "disk, cold" if cell.cold else place,
            **timing_row(store, cell, results, passes[Cell()], benchmark.new_tokens, None),
        }
        for place, passes in places
        for cell, results in passes.items()
        if cell.capacity
    ]
    resident = [
        benchmark.new_tokens / seconds
        for _, passes in places
        for one in passes[Cell()]
        for seconds in one.decode_seconds
    ]
    report = {
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
        "rows": rows,
        "decodings": len(rows) * benchmark.repeats * benchmark.num_prompts,
        "decodings_with_a_logit_not_equal_to_the_bit": sum(
            one.inexact for _, passes in places for results in passes.values() for one in results
        ),
        "machine": describe_machine(settings.device),
    }
    write_json("reports/benchmarks/gpu_cache.json", report)


if __name__ == "__main__":
    run(main, __doc__)
