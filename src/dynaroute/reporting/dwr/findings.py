"""What the numbers of a DWR run say, by rules that are written down here and printed with every finding.

A rule has an answer for each outcome: the report states what was measured, not what was hoped for.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.01  # nats: validation losses that are no further apart count as level
SIGNIFICANT = 0.05  # a trend is reported as one if chance alone gives it less often than this
COLLAPSED = 0.1  # of the uniform share: an expert with less load has collapsed


class Trend(NamedTuple):
    """Whether a quantity grows or shrinks with depth."""

    rank_correlation: float  # Spearman's, of layer and quantity
    chance: float  # how often layers in random order correlate at least as strongly, in either direction
    layers: int

    @property
    def direction(self) -> int:
        """1 if it grows, -1 if it shrinks, 0 if neither is clear."""
        return int(math.copysign(1, self.rank_correlation)) if self.chance < SIGNIFICANT else 0

    @property
    def too_few_layers(self) -> bool:
        """Whether no order of so many layers is clear: the clearest are the rising and the falling one."""
        return 2 / math.factorial(self.layers) >= SIGNIFICANT


def depth_trend(values: "pd.Series") -> Trend | None:
    """The trend of a quantity over the layers, in order of depth; None for a single layer or equal values."""
    layers = len(values)
    if values.nunique() < 2:
        return None
    ranks = values.rank().tolist()
    depths = values.reset_index(drop=True).index.to_series()
    correlation = float(depths.corr(values.rank().reset_index(drop=True)))  # Pearson's of ranks is Spearman's
    if layers <= 8:  # all 40,320 orders at most
        strengths = [abs(_rank_covariance(order)) for order in itertools.permutations(ranks)]
        chance = sum(strength >= abs(_rank_covariance(ranks)) for strength in strengths) / len(strengths)
    else:  # the normal approximation
        chance = math.erfc(abs(correlation) * math.sqrt((layers - 1) / 2))
    return Trend(correlation, chance, layers)


def _rank_covariance(ranks: Sequence[float]) -> float:
    """Spearman's correlation of position and rank but for a factor; exact, since ranks are halves of integers."""
    middle = (len(ranks) - 1) / 2
    return sum((layer - middle) * rank for layer, rank in enumerate(ranks))


def gate_norms_by_layer(router: "pd.DataFrame") -> "pd.DataFrame":
    """Columns min, max, mean and spread (max - min) of the gate norms, a row for each layer."""
    norms = router.groupby("layer")["gate_norm"].agg(["min", "max", "mean"])
    return norms.assign(spread=norms["max"] - norms["min"])


def relative_load(router: "pd.DataFrame") -> "pd.Series":
    """Each expert's load in units of the uniform share, by (layer, expert)."""
    loads = router.set_index(["layer", "expert"])["load"]
    return loads * loads.groupby("layer").transform("size")


class Course(NamedTuple):
    """How losses went on after the best validation."""

    best: "pd.Series"  # rows of the training curve
    last: "pd.Series"
    training_loss_fell: bool  # meanwhile

    @property
    def rise(self) -> float:
        """Of the validation loss from the best to the last validation, in nats."""
        return self.last.validation_loss - self.best.validation_loss

    @property
    def turned(self) -> bool:
        """Whether the validation loss rose by more than `LEVEL`."""
        return self.rise > LEVEL

    @property
    def overfitted(self) -> bool:
        """Whether it did so while the training loss went on falling."""
        return self.turned and self.training_loss_fell


def course(curve: "pd.DataFrame") -> Course:
    """The course of a training with its curve."""
    best = curve["validation_loss"].idxmin()
    meanwhile = curve.loc[best:, "train_loss"].dropna()  # there is none of step 0
    return Course(curve.loc[best], curve.iloc[-1], bool(meanwhile.iloc[-1] < meanwhile.iloc[0]))
