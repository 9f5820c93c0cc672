"""reports/dwr_runs.md: what the balance loss costs and gives a cache, and which remedies for overfitting help.

The sentences stand in templates/dwr_runs.md.
"""

from typing import Any

from dynaroute.config import Settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dwr.results import DATA
from dynaroute.reporting.inputs import Record, read_record
from dynaroute.reporting.pages import render


def read_runs(settings: Settings) -> list[Record]:
    """Reads what every run found, the reference first.

    Raises:
        DynarouteError: a file is missing, damaged or of other settings.
    """
    runs = []
    for name in sorted(settings.dwr_runs, key=lambda name: name != "reference"):
        run = read_record(DATA / f"run_results/{name}.json")
        if run["settings"] != settings.dwr_run(name).model_dump():
            raise DynarouteError(f"{run.path}: of other settings than dwr_runs.{name}: run dvc repro")
        runs.append(run)
    return runs


def sweep(runs: list[Record]) -> list[Record]:
    """The reference and the runs that differ from it in the balance coefficient alone, by that coefficient."""
    chosen = [run for run in runs if changes(run, runs[0]).keys() <= {"balance_coefficient"}]
    return sorted(chosen, key=lambda run: run["settings"]["balance_coefficient"])


def changes(run: Record, reference: Record) -> dict[str, Any]:
    """The settings that differ from the reference's, by their names in params.yaml."""
    own, theirs = (
        {**record["settings"], **{f"training.{key}": value for key, value in record["settings"]["training"].items()}}
        for record in (run, reference)
    )
    return {key: value for key, value in own.items() if key != "training" and value != theirs[key]}


def page(runs: list[Record]) -> str:
    """The page as Markdown."""
    reference, swept = runs[0], sweep(runs)
    remedies = [reference, *(run for run in runs if run not in swept)]
    return render(
        "dwr_runs.md",
        {
            "reference": reference,
            "best": max(swept, key=lambda run: run["hit_rate"]["lru"]),
            "rows": {
                "sweep": [
                    {**run, "lambda": run["settings"]["balance_coefficient"], **run["hit_rate"]}
                    | {f"uniform_{policy}": rate for policy, rate in run["uniform_hit_rate"].items()}
                    for run in swept
                ],
                "remedies": [
                    {
                        **run,
                        **run["hit_rate"],
                        "changes": ", ".join(f"{key} = {value}" for key, value in changes(run, reference).items())
                        or None,
                        "gap": run["final_validation_loss"] - run["final_train_loss"],
                    }
                    for run in remedies
                ],
            },
        },
    )
