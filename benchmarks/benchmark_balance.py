"""Trains the DWR runs that differ in the balance coefficient with three seeds each.

    PYTHONPATH=src python benchmarks/benchmark_balance.py  (dvc repro benchmarks/dvc.yaml:benchmark_balance)

Reads   data/tokens/<corpus of the runs>
Writes  reports/benchmarks/balance.json  a row for each coefficient and seed; report_dwr shows it
"""

from typing import Any

import torch

from dynaroute.analysis.dwr_runs import train_and_measure
from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.findings import BALANCE, sweep

SEEDS = 3  # that of the reference and those after it


def main(settings: Settings) -> None:
    """Trains one run after another."""
    torch.set_num_threads(settings.num_threads)
    names = sorted(settings.dwr_runs, key=lambda name: name != "reference")
    swept = sweep([{"name": name, "settings": settings.dwr_run(name).model_dump()} for name in names])
    first, found = settings.dwr_run("reference").seed, []
    for name in (one["name"] for one in swept):
        for seed in range(first, first + SEEDS):
            train_and_measure(settings, name, settings.dwr_run(name).model_copy(update={"seed": seed}), found.append)
    reference = next(one["run"] for one in found if one["name"] == "reference")
    write_json("reports/benchmarks/balance.json", {"reference": reference, "rows": [row(one) for one in found]})


def row(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a run."""
    measured = {name: found[name] for name in ("test_loss", "smallest_load", "largest_load")}
    return {"lambda": found["settings"][BALANCE], "seed": found["settings"]["seed"], **measured, **found["hit_rate"]}


if __name__ == "__main__":
    run(main, __doc__)
