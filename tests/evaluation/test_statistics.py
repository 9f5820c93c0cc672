import math

import numpy as np
import pytest
import scipy.stats

from dynaroute.errors import DynarouteError
from dynaroute.evaluation.statistics import Interval, paired_difference, verdict


def test_the_interval_is_the_textbook_formula():
    ours, theirs = [2.0, 4.0, 9.0, 5.0], [1.0, 4.5, 6.0, 5.0]
    difference = [1.0, -0.5, 3.0, 0.0]
    mean = sum(difference) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in difference) / 3)
    margin = 3.182446305284263 * deviation / 2  # the 97.5 % quantile of Student's t with 3 degrees of freedom
    found = paired_difference(ours, theirs)
    assert found.n == 4
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - margin, mean + margin), rel=1e-12)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_interval_is_that_of_scipy(confidence):
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 30))
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(confidence)
    found = paired_difference(ours, theirs, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-10)


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        shared = rng.normal(0, 10, 8)  # what pairing takes out
        found = paired_difference(shared + rng.normal(0.3, 1, 8), shared + rng.normal(0, 1, 8))
        covered += found.low <= 0.3 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_no_difference_at_all_is_an_interval_of_zero_width():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == Interval(0.0, 0.0, 0.0, 2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-2.0, -0.1, "better"),
        (0.1, 2.0, "worse"),
        (-1.0, 1.0, "no difference shown"),
        (0.0, 0.0, "no difference shown"),
        (-1.0, 0.0, "no difference shown"),
        (0.0, 1.0, "no difference shown"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high, 9)) == expected


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([[1.0, 2.0]], [[1.0, 2.0]])])
def test_what_has_no_pairs_to_compare_is_refused(ours, theirs):
    with pytest.raises(DynarouteError, match="two sequences"):
        paired_difference(ours, theirs)
