"""Repeats the primary questions with other global seeds, and with one thread: does any answer change?

    python benchmarks/benchmark_stability.py

Each repetition runs the pipeline to `compare_variants` in a clone of the current commit that shares DVC's cache.

Reads   the repository, committed
Writes  reports/benchmarks/stability.json   runs, a row for each repetition: seed, num_threads, primary (its questions
            as `compare_variants` answers them); changed, the questions whose answer is not the same in all of them
"""

import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.stage import run
from dynaroute.pipeline.terminal import output_of

SEEDS = (11, 12, 13)  # none is that of a variant: the seed of P1s1 is 1 whatever the global one


def main(settings: Settings) -> None:
    """Runs all repetitions, and compares their answers."""
    repetitions = [{"seed": seed, "num_threads": settings.num_threads} for seed in SEEDS]
    repetitions.append({"seed": settings.seed, "num_threads": 1})
    runs = [repetition | {"primary": answers(repetition)} for repetition in tqdm(repetitions, disable=None)]
    found: dict[str, set[str]] = {}
    for one in [*runs, {"primary": read_record("data/dagformer/comparisons.json")["primary"]}]:
        for row in one["primary"]:
            found.setdefault(row["id"], set()).add(row["answer"])
    changed = [key for key, own in found.items() if len(own) > 1]
    write_json("reports/benchmarks/stability.json", {"runs": runs, "changed": changed})


def answers(overrides: dict[str, int]) -> list[dict[str, Any]]:
    """The primary questions of a run with some settings of params.yaml replaced."""
    cache = output_of("dvc", "cache", "dir")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        output_of("git", "clone", "--quiet", "--shared", ".", str(copy))
        output_of("dvc", "cache", "dir", "--local", cache, cwd=copy)
        assignments = [f"--set-param={key}={value}" for key, value in overrides.items()]
        output_of("dvc", "exp", "run", *assignments, "compare_variants", cwd=copy)
        return read_record(copy / "data/dagformer/comparisons.json")["primary"]


if __name__ == "__main__":
    run(main, __doc__)
