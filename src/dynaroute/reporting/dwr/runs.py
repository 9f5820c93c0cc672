"""reports/dwr_runs.md: how training runs over ten epochs, what the balance loss gives a cache, what helps overfitting.

The sentences stand in templates/dwr_runs.md. Published numbers appear as in `reporting.dwr.report`.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaroute.config import Settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.results import DATA
from dynaroute.reporting.inputs import REMEDY, Record, read_record
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import interval

if TYPE_CHECKING:
    import pandas as pd

BALANCE, PATIENCE = "balance_coefficient", "training.early_stopping_patience"
LEARNED = 2  # times below the unigram perplexity: a model that has learned more than token frequencies
SHOWN = ("test_loss", "smallest_load", "largest_load", "lru", "next_use")  # of the balance benchmark


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


def curve(run: Record) -> "pd.DataFrame":
    """The validations of a run, a row each.

    Raises:
        DynarouteError: there is none after the first step.
    """
    import pandas as pd  # it is slow to import

    rows = pd.DataFrame([dict(row) for row in run["history"]])
    if "train_loss" not in rows:
        raise DynarouteError(f"{run.path}: 'history' must have a row after step 0: {REMEDY}")
    return rows


def gate_norms(run: Record, measure: str) -> np.ndarray:
    """The `min`, `max` or `mean` gate norm of each layer at each validation, [rows, L]."""
    names = [f"validation_gate_norm_{measure}_layer{layer}" for layer in range(run["settings"]["num_layers"])]
    return np.array([[row[name] for name in names] for row in run["history"]])


def differing_in(runs: list[Record], *keys: str) -> list[Record]:
    """The reference, and the runs that differ from it in some of these settings alone."""
    return [run for run in runs if changes(run, runs[0]).keys() <= {*keys}]


def sweep(runs: list[Record]) -> list[Record]:
    """The runs that differ in the balance coefficient alone, by it; when a run stops does not count."""
    return sorted(differing_in(runs, BALANCE, PATIENCE), key=lambda run: run["settings"][BALANCE])


def changes(run: Record, reference: Record) -> dict[str, Any]:
    """The settings that differ from the reference's, by their names in params.yaml."""
    own, theirs = (
        {**record["settings"], **{f"training.{key}": value for key, value in record["settings"]["training"].items()}}
        for record in (run, reference)
    )
    return {key: value for key, value in own.items() if key != "training" and value != theirs[key]}


def page(runs: list[Record], balance: Record | None, published: Record) -> str:
    """The page as Markdown.

    Args:
        runs: of `read_runs`.
        balance: the benchmark of the balance loss over several seeds, which counts if it had the same reference; None
            if it was not run.
        published: the published numbers.
    """
    reference, seeds, swept = runs[0], differing_in(runs, "seed"), sweep(runs)
    curves = [curve(run) for run in seeds]
    spreads = np.stack([gate_norms(run, "max")[-1] - gate_norms(run, "min")[-1] for run in seeds])  # [S, L]
    if balance is not None and balance["reference"] != reference["run"]:
        balance = None
    theirs = [row["spread"] for row in published["gate_norms"]["rows"]]
    weakest = max(runs, key=lambda run: run["test_loss"] - run["test_unigram_entropy"])
    return render(
        "dwr_runs.md",
        {
            "reference": reference,
            "published": published,
            "rules": findings,
            "learned": LEARNED,
            "seeds": seeds,
            "courses": [findings.course(one) for one in curves],
            "stability": findings.stability(curves[0]),
            "depth": findings.over_seeds(findings.depth_slopes(spreads)) if spreads.shape[1] > 1 else None,
            "published_slope": findings.depth_slopes(np.array([theirs]))[0],
            "stopped": [run for run in runs if run["steps"] < run["steps_planned"]],
            "weakest": weakest,
            "factor": math.exp(weakest["test_unigram_entropy"] - weakest["test_loss"]),
            "best": max(swept, key=lambda run: run["hit_rate"]["lru"]),
            "balance": None if balance is None else list(_balance(balance["rows"], reference["settings"][BALANCE])),
            "rows": {
                "epochs": _epochs(curves[0], published["training_curve"]),
                "gates": _gates(reference, spreads, published["gate_norms"]),
                "sweep": [
                    {**run, "lambda": run["settings"][BALANCE], **run["hit_rate"]}
                    | {f"uniform_{policy}": rate for policy, rate in run["uniform_hit_rate"].items()}
                    for run in swept
                ],
                "remedies": [
                    {
                        **run,
                        **run["hit_rate"],
                        "changes": ", ".join(f"{key} = {value}" for key, value in changes(run, reference).items())
                        or None,
                        "train": run["history"][-1]["train_loss"],
                        "validation": run["history"][-1]["validation_loss"],
                        "gap": run["history"][-1]["validation_loss"] - run["history"][-1]["train_loss"],
                    }
                    for run in runs
                    if run is reference or (run not in swept and run not in seeds)
                ],
            },
        },
    )


def _epochs(curve: "pd.DataFrame", published: Record) -> "pd.DataFrame":
    """A row for each validation, beside the published row of the same epoch."""
    losses = curve["validation_loss"]
    ours = curve.assign(
        balance=curve.filter(regex="^validation_balance_").mean(axis=1),
        status=["**best**" if loss == losses.min() else None for loss in losses],
    )
    return _beside(ours.set_index("epoch"), published)


def _gates(reference: Record, spreads: np.ndarray, published: Record) -> "pd.DataFrame":
    """Gate norms after the last epoch, a row for each layer, beside the published ones."""
    import pandas as pd

    least, most, mean = (gate_norms(reference, measure) for measure in ("min", "max", "mean"))  # [rows, L]
    columns = {"initial": most[0] - least[0], "min": least[-1], "max": most[-1], "mean": mean[-1], "spread": spreads[0]}
    columns["seeds"] = [interval(findings.over_seeds(layer), 3, "") for layer in spreads.T]
    return _beside(pd.DataFrame(columns).rename_axis("layer"), published)


def _beside(ours: "pd.DataFrame", published: Record) -> "pd.DataFrame":
    """A table with the published rows of the same index beside ours, as columns that begin with `their_`."""
    import pandas as pd

    theirs = pd.DataFrame([dict(row) for row in published["rows"]]).set_index(ours.index.name)
    return ours.join(theirs.add_prefix("their_"), how="outer").reset_index()


def _balance(rows: list[Record], reference: float) -> Iterable[dict[str, Any]]:
    """A row for each coefficient: means over seeds with their intervals, and the hits of LRU minus the reference's."""

    def by_seed(coefficient: float, name: str) -> np.ndarray:
        return np.array([row[name] for row in rows if row["lambda"] == coefficient])

    for coefficient in sorted({row["lambda"] for row in rows}):
        means = {name: interval(findings.over_seeds(by_seed(coefficient, name)), 3, "") for name in SHOWN}
        more = findings.over_seeds(by_seed(coefficient, "lru") - by_seed(reference, "lru"))
        yield {"lambda": coefficient, **means, "more": None if coefficient == reference else more}
