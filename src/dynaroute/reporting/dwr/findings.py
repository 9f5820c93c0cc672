"""What the numbers of a DWR run say: one function for each finding, with an answer for each outcome.

The rules stand here and in the templates, which choose the sentence.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynaroute.analysis.statistics import paired_difference

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.01  # nats: validation losses that are no further apart count as level
SPIKE = 0.5  # nats: a loss that rises by more from one row to the next counts as a spike
COLLAPSED = 0.1  # of the uniform share: an expert with less load has collapsed


class Course(NamedTuple):
    """What losses did after the best validation."""

    best: "pd.Series"  # rows of the training curve
    last: "pd.Series"
    training_loss_fell: bool  # meanwhile

    @property
    def rise(self) -> float:
        """Of the validation loss from the best to the last validation, in nats."""
        return self.last.validation_loss - self.best.validation_loss

    @property
    def outcome(self) -> str:
        """`overfits`, `unstable` (training loss rose as well), `level` or `lowest` (the last is the best)."""
        if self.rise > LEVEL:
            return "overfits" if self.training_loss_fell else "unstable"
        return "level" if self.rise > 0 else "lowest"


def course(curve: "pd.DataFrame") -> Course:
    """Whether validation loss turned, and whether training loss kept falling."""
    best = curve["validation_loss"].idxmin()
    meanwhile = curve.loc[best:, "train_loss"].dropna()  # there is none of step 0
    return Course(curve.loc[best], curve.iloc[-1], bool(meanwhile.iloc[-1] < meanwhile.iloc[0]))


def stability(curve: "pd.DataFrame") -> dict[str, float]:
    """The largest rise of each loss between two rows, in nats, and the range of gradient norms before clipping."""
    norms = curve["train_gradient_norm"].dropna()
    rises = {f"{name}_rise": float(curve[f"{name}_loss"].diff().max()) for name in ("train", "validation")}
    return {**rises, "lowest_norm": norms.min(), "highest_norm": norms.max()}


def initial_gate_norm(d_model: int) -> float:
    """The expected gate norm of an untrained router, whose weights are drawn with a standard deviation of 0.02."""
    return 0.02 * math.sqrt(d_model)


def initial_spread(num_experts: int) -> float:
    """The expected largest minus smallest gate norm of an untrained layer.

    The norm of many normal weights is itself nearly normal, with a standard deviation of 0.02 / sqrt(2), whatever
    their number.
    """
    from scipy.special import ndtr

    x = np.linspace(-8, 8, 4001)
    within = 1 - ndtr(x) ** num_experts - ndtr(-x) ** num_experts  # x lies between the least and the largest
    return 0.02 / math.sqrt(2) * float(np.trapezoid(within, x))


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


def best_online(rates: Mapping[str, float]) -> str:
    """The policy with the highest hit rate but for MIN, which knows the future."""
    return max((policy for policy in rates if policy != "min"), key=rates.__getitem__)


def gap_closed(hits: "pd.DataFrame", per_layer: bool, better: bool = False) -> "pd.DataFrame":
    """The share of the gap between LRU and MIN that each other policy closes, by capacity; NaN where there is none.

    With `better`, LRU is that with one budget or that with a share per layer, whichever hits more at a capacity.
    """
    rates = hits[hits["per_layer"] == per_layer].pivot(index="capacity", columns="policy", values="hit_rate")
    if "lru" not in rates:
        return rates.iloc[:, :0]
    others = [name for name in hits["policy"].unique() if name in rates and name not in ("lru", "min")]
    lru = rates["lru"]
    if better:
        lru = hits[hits["policy"] == "lru"].groupby("capacity")["hit_rate"].max()
    gap = rates["min"] - lru
    return rates[others].sub(lru, axis=0).div(gap.where(gap > 0), axis=0)
