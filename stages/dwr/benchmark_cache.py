"""Reads held-out text token by token with the experts in caches, compared with all of them resident.

    python stages/dwr/benchmark_cache.py

Every capacity with every policy and prefetcher. Every logit of every cell must equal the resident model's to the bit,
or the stage fails. Always on the CPU.

Reads   data/dwr/expert_store, data/tokens/<dwr.corpus>
Writes  data/dwr/cache/           cells.csv: hit rates, evictions and prefetches of each cell; summary.json
                                  if every prediction is followed
        data/dwr/measured/cache/  cells.csv: speed, waiting, reads and memory of each cell; summary.json
"""

from pathlib import Path

import torch

from dynaroute.analysis.cache_benchmark import Cell, held_out_texts, make_cells, peak_memory, sweep
from dynaroute.analysis.cache_results import checks, exact_row, timing_row, timing_summary
from dynaroute.config import Settings
from dynaroute.dwr.experts.residency import nearest_a_third
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.pipeline.artifacts import output_directory, write_csv, write_json
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
    counted = sweep(store, texts, benchmark.prompt_tokens, warm, benchmark.lookahead, 1, selective=False)
    memory = peak_memory(STORE, texts, benchmark.prompt_tokens, benchmark.capacities)

    rows = [exact_row(store, cell, counted[cell][0]) for cell in warm]
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
                "checks": checks(passes),
            },
        )
    timing = [
        timing_row(store, cell, results, passes[Cell()], benchmark.new_tokens, memory.get(cell))
        for cell, results in passes.items()
    ]
    with output_directory("data/dwr/measured/cache") as folder:
        write_csv(folder / "cells.csv", timing)
        write_json(folder / "summary.json", timing_summary(store, memory, benchmark.repeats))


if __name__ == "__main__":
    run(main, __doc__)
