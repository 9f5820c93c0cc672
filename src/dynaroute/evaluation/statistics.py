"""The statistics under the reports' claims. Verdicts are made by rule, here, and never by hand.

Every measure compared is one of which less is better, such as NLL.
"""

from typing import Literal, NamedTuple

import numpy as np

from dynaroute.errors import DynarouteError

Verdict = Literal["better", "worse", "no difference shown"]


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    n: int


def paired_difference(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean of ours - theirs over n pairs, and its two-sided t interval.

    Args:
        ours: [n], one number a window, say.
        theirs: [n], of the same windows in the same order.
        confidence: between 0 and 1.

    Raises:
        DynarouteError: not two sequences of the same length, or fewer than two pairs, which have no spread.
    """
    from scipy.special import stdtrit  # quantiles of Student's t, without the second that scipy.stats takes to import

    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise DynarouteError(f"pairs of shapes {ours.shape} and {theirs.shape}: must be two sequences of n > 1 numbers")
    difference = ours - theirs
    n = len(difference)
    mean = float(difference.mean())
    margin = float(stdtrit(n - 1, (1 + confidence) / 2) * difference.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - margin, mean + margin, n)


def verdict(interval: Interval) -> Verdict:
    """What an interval of a difference shows: "better" if all of it is below 0, "worse" if all of it is above."""
    if interval.high < 0:
        return "better"
    return "worse" if interval.low > 0 else "no difference shown"
