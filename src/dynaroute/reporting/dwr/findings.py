"""What the numbers of DWR runs say: one function for each finding. The rules are here, the sentences in templates/."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynaroute.analysis.statistics import paired_difference
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import REMEDY, Record

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.01  # nats: validation losses that are no further apart count as level
BALANCE, PATIENCE = "balance_coefficient", "training.early_stopping_patience"


class Course(NamedTuple):
    """What losses did after the best validation."""

    best: "pd.Series"  # rows of the training curve
    last: "pd.Series"
    overfits: bool  # the validation loss ends more than LEVEL above its best, and training loss fell meanwhile

    @property
    def rise(self) -> float:
        """Of the validation loss from the best to the last validation, in nats."""
        return self.last.validation_loss - self.best.validation_loss


def curve(run: Record) -> "pd.DataFrame":
    """The validations of a DWR run, a row each.

    Raises:
        DynarouteError: there is none after the first step.
    """
    import pandas as pd  # it is slow to import

    rows = pd.DataFrame([dict(row) for row in run["history"]])
    if "train_loss" not in rows:
        raise DynarouteError(f"{run.path}: 'history' must have a row after step 0: {REMEDY}")
    return rows


def course(curve: "pd.DataFrame") -> Course:
    """Whether validation loss turned while training loss kept falling."""
    best = curve["validation_loss"].idxmin()
    meanwhile = curve.loc[best:, "train_loss"].dropna()  # there is none of step 0
    found = Course(curve.loc[best], curve.iloc[-1], False)
    return found._replace(overfits=bool(found.rise > LEVEL and meanwhile.iloc[-1] < meanwhile.iloc[0]))


def gate_norms(run: Record, measure: str) -> np.ndarray:
    """The `min`, `max` or `mean` gate norm of each layer at each validation, [rows, L]."""
    names = [f"validation_gate_norm_{measure}_layer{layer}" for layer in range(run["settings"]["num_layers"])]
    return np.array([[row[name] for name in names] for row in run["history"]])


def over_seeds(values: np.ndarray) -> dict[str, float] | None:
    """The mean, low and high of one value for each seed, [S], with a 95 % interval; None for a single seed."""
    return paired_difference(values, np.zeros(len(values)))._asdict() if len(values) > 1 else None


def depth_slopes(spreads: np.ndarray) -> np.ndarray:
    """How much the spread of gate norms [S, L] grows from a layer to the next, by least squares for each seed, [S]."""
    return np.polyfit(np.arange(spreads.shape[1]), spreads.T, 1)[0]


def relative_load(router: "pd.DataFrame") -> "pd.Series":
    """Each expert's load in units of the uniform share, by (layer, expert)."""
    loads = router.set_index(["layer", "expert"])["load"]
    return loads * loads.groupby("layer").transform("size")


def changes(run: Record, reference: Record) -> dict[str, Any]:
    """The settings that differ from the reference's, by their names in params.yaml."""
    own, theirs = (
        {**record["settings"], **{f"training.{key}": value for key, value in record["settings"]["training"].items()}}
        for record in (run, reference)
    )
    return {key: value for key, value in own.items() if key != "training" and value != theirs[key]}


def differing_in(runs: list[Record], *keys: str) -> list[Record]:
    """The reference, and the runs that differ from it in some of these settings alone."""
    return [run for run in runs if changes(run, runs[0]).keys() <= {*keys}]


def sweep(runs: list[Record]) -> list[Record]:
    """The runs that differ in the balance coefficient alone, by it; when a run stops does not count."""
    return sorted(differing_in(runs, BALANCE, PATIENCE), key=lambda run: run["settings"][BALANCE])


def gap_closed(hits: "pd.DataFrame", per_layer: bool, capacity: int, better: bool = False) -> dict[str, float]:
    """The share of the gap between LRU and MIN that each other policy closes; empty where there is no gap.

    With `better`, LRU is that with one budget or that with a share for each layer, whichever hits more.
    """
    hits = hits[hits["capacity"] == capacity]
    rates = hits[hits["per_layer"] == per_layer].set_index("policy")["hit_rate"]
    lru = (hits if better else hits[hits["per_layer"] == per_layer]).query("policy == 'lru'")["hit_rate"].max()
    gap = rates.get("min", lru) - lru  # NaN without LRU
    return {name: (rate - lru) / gap for name, rate in rates.items() if name not in ("lru", "min") and gap > 0}
