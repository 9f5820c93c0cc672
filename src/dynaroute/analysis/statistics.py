"""The statistics under the reports' claims, over scipy. Verdicts are made by rule, here, and never by hand.

Every measure compared is one of which less is better, such as NLL. scipy.stats is imported where it is needed: that
takes a second.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from dynaroute.errors import DynarouteError

Verdict = Literal["better", "worse", "no difference shown", "too close to say"]
SIGNIFICANT = 0.05  # of a p-value, after correction for the other tests of its family
RESAMPLES = 9_999  # of bootstrap intervals and sign flips
FLIPS = 99_999  # of corrected p-values
SETS = 5  # of flips, for a corrected p-value with its Monte Carlo error
CLOSE = 2.78  # Monte Carlo errors: a p-value no farther from SIGNIFICANT decides nothing; t of 95 % with SETS - 1
_FLIPS_AT_ONCE = 4_096  # drawn; signs of all of them would take the number of documents times the memory


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """A paired difference, ours - theirs, and what it rests on; see `compare`."""

    mean: float
    low: float
    high: float
    n: int
    bootstrap_low: float
    bootstrap_high: float
    groups: int
    p: float
    effect_size: float | None
    detectable: float


class PermutationTest(NamedTuple):
    """A statistic, what it is on average where nothing but chance is at work, and the chance of one as large."""

    observed: Any  # a number, or an array of them
    chance: Any
    p: Any


class CorrectedP(NamedTuple):
    """Corrected p-values and how far chance in drawing the flips may have them off."""

    p: np.ndarray  # [m]
    error: np.ndarray  # [m], standard errors


def paired_difference(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean of ours - theirs over n pairs, and its two-sided t interval.

    Args:
        ours: [n], one number a window, say.
        theirs: [n], of the same windows in the same order.
        confidence: between 0 and 1.

    Raises:
        DynarouteError: not two sequences of the same length, or fewer than two pairs, which have no spread.
    """
    difference = _differences(ours, theirs)
    n, mean = len(difference), float(difference.mean())
    margin = _t_quantile(n, (1 + confidence) / 2) * _standard_error(difference)
    return Interval(mean, mean - margin, mean + margin, n)


def verdict(interval: Interval) -> Verdict:
    """What an interval of a difference shows: "better" if all of it is below 0, "worse" if all of it is above."""
    if interval.high < 0:
        return "better"
    return "worse" if interval.low > 0 else "no difference shown"


def corrected_verdict(difference: float, p: float, error: float = 0.0) -> Verdict:
    """What a difference shows by its p-value, corrected for the other tests of its family: the rule is SIGNIFICANT.

    Where p is within CLOSE Monte Carlo errors of SIGNIFICANT, other flips could have put it on the other side, and the
    verdict is "too close to say": it must not depend on a seed.

    Args:
        difference: below 0 if ours is better.
        p: corrected.
        error: the Monte Carlo standard error of p, if it is known.
    """
    if error and abs(p - SIGNIFICANT) <= CLOSE * error:
        return "too close to say"
    if p >= SIGNIFICANT:
        return "no difference shown"
    return "better" if difference < 0 else "worse"


def compare(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, seed: int) -> Comparison:
    """All that is said of one paired difference over n windows.

    Windows of one document are not independent. Interval and effect size treat them as if they were, as is usual;
    the bootstrap interval and p draw whole documents.

    Args:
        ours: [n], one number a window.
        theirs: [n], of the same windows.
        groups: [n], which document each window is of.
        seed: of the resampling.

    Returns:
        mean, low, high, n: see `paired_difference`.
        bootstrap_low, bootstrap_high: see `bootstrap_difference`.
        groups: the number of documents.
        p: see `sign_flip_p`.
        effect_size: see `effect_size`; None where all differences are the same, as for two equal models.
        detectable: see `minimum_detectable_difference`.
    """
    interval = paired_difference(ours, theirs)
    resampled = bootstrap_difference(ours, theirs, groups, seed)
    effect = effect_size(ours, theirs)
    return Comparison(
        *interval,
        bootstrap_low=resampled.low,
        bootstrap_high=resampled.high,
        groups=resampled.n,
        p=sign_flip_p(ours, theirs, groups, seed),
        effect_size=effect if np.isfinite(effect) else None,
        detectable=minimum_detectable_difference(ours, theirs),
    )


def bootstrap_difference(
    ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, seed: int, confidence: float = 0.95
) -> Interval:
    """The mean of ours - theirs, and its percentile bootstrap interval from whole groups drawn with replacement.

    Returns:
        The mean is over all n pairs; the interval's n is the number of groups.

    Raises:
        DynarouteError: what `paired_difference` raises, a difference is not finite, or there are fewer than two groups.
    """
    difference = _differences(ours, theirs)
    return bootstrap_ratio(difference, np.ones_like(difference), groups, seed, confidence)


def bootstrap_ratio(
    parts: np.ndarray, wholes: np.ndarray, groups: np.ndarray, seed: int, confidence: float = 0.95
) -> Interval:
    """The ratio of two sums over n, and its percentile bootstrap interval from whole groups drawn with replacement.

    Args:
        parts: [n], numerators.
        wholes: [n], denominators; where their sum may be near 0 the ratio says nothing.
        groups: [n], such as documents.
        seed: of the drawing.
        confidence: between 0 and 1.

    Returns:
        The ratio and its interval, whose n is the number of groups.

    Raises:
        DynarouteError: there are fewer than two groups, or numbers that are not finite.
    """
    from scipy.stats import bootstrap

    sums, _ = _by_group(np.stack([parts, wholes], axis=1).astype(np.float64), groups)  # [groups, 2]
    found = bootstrap(
        tuple(sums.T),
        lambda part, whole, axis: part.sum(axis) / whole.sum(axis),
        n_resamples=RESAMPLES,
        paired=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    ratio = float(sums[:, 0].sum() / sums[:, 1].sum())
    return Interval(ratio, float(found.confidence_interval.low), float(found.confidence_interval.high), len(sums))


def sign_flip_p(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """The two-sided p-value of the paired permutation test, in which ours and theirs change places by whole groups.

    It asks for nothing but that the two are exchangeable if there is no difference: no normal distribution.

    Raises:
        DynarouteError: what `bootstrap_difference` raises.
    """
    from scipy.stats import permutation_test

    sums, _ = _by_group(_differences(ours, theirs), groups)
    found = permutation_test(
        (sums, np.zeros_like(sums)),
        lambda one, other, axis: (one - other).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def permutation_test(
    statistic: Callable[[np.ndarray], Any], labels: np.ndarray, permutations: int, seed: int
) -> PermutationTest:
    """Compares a statistic with what it is when the labels are dealt out anew.

    Args:
        statistic: of labels in some order; a number or an array of them, of which more is a stronger effect.
        labels: [n], in their true order.
        permutations: random ones. The true order counts as one more, so that p is never 0.
        seed: of the permutations.

    Returns:
        The statistic of the true order, its mean over the permutations and its one-sided p-value.

    Raises:
        DynarouteError: the statistic is not finite, in the true order or another.
    """
    rng = np.random.default_rng(seed)
    observed = np.asarray(statistic(labels), np.float64)
    null = np.stack([np.asarray(statistic(rng.permutation(labels)), np.float64) for _ in range(permutations)])
    return _against_chance(observed, null)


def mean_vector_test(vectors: np.ndarray, groups: np.ndarray, permutations: int, seed: int) -> PermutationTest:
    """Whether the mean of n vectors differs from 0 at all.

    The statistic is the mean size of its entries, against that when the signs of whole groups are flipped. What the
    entries of a vector have in common stays as it is, so it needs no correction for their number.

    Args:
        vectors: [n, E].
        groups: [n], such as documents, whose vectors keep their signs relative to each other.
        permutations: random flips.
        seed: of the flips.

    Raises:
        DynarouteError: what `bootstrap_difference` raises.
    """
    sums, _ = _by_group(np.asarray(vectors, np.float64), groups)  # [m, E]
    rng = np.random.default_rng(seed)
    observed = np.abs(sums.sum(0)).mean() / len(vectors)
    # Drawn one by one: all of them at once, [permutations, E], would not fit into memory for a large base.
    signs = (rng.choice((-1.0, 1.0), len(sums)) for _ in range(permutations))
    null = np.array([np.abs(sign @ sums).mean() / len(vectors) for sign in signs])
    return PermutationTest(*map(float, _against_chance(observed, null)))


def _against_chance(observed: np.ndarray, null: np.ndarray) -> PermutationTest:
    """Statistics [...] held against those of permutations, [permutations, ...]."""
    if not (np.isfinite(observed).all() and np.isfinite(null).all()):  # nothing is as large as NaN: p would be smallest
        raise DynarouteError("a statistic that is not finite, for the labels or a permutation of them, has no p-value")
    slack = 1e-12 * np.abs(observed)  # what is equal but for the order of its sums is as large
    p = (1 + (null >= observed - slack).sum(0)) / (1 + len(null))
    return PermutationTest(observed[()], null.mean(0)[()], p[()])


def settled_westfall_young(differences: np.ndarray, groups: np.ndarray, seed: int) -> CorrectedP:
    """The p-values of `westfall_young`, each the mean over SETS sets of flips, with the standard error of that mean.

    Among random flips, the p-values that the procedure compares are counted ones, and of many tests the smallest is
    near the floor of 1 / (1 + FLIPS) again and again. So a corrected p-value is off by more than a plain share of
    flips is (Ge, Dudoit and Speed 2003, Test 12, 1-77), and its error is measured, from sets that are independent.

    Args:
        differences: [n, m].
        groups: [n], such as documents.
        seed: of all flips.

    Raises:
        DynarouteError: what `bootstrap_difference` raises.
    """
    seeds = np.random.SeedSequence(seed).spawn(SETS)
    found = np.stack([westfall_young(differences, groups, one) for one in seeds])
    return CorrectedP(found.mean(0), found.std(0, ddof=1) / np.sqrt(SETS))


def westfall_young(differences: np.ndarray, groups: np.ndarray, seed: int | np.random.SeedSequence) -> np.ndarray:
    """P-values [m] of m paired differences by sign flips of whole groups, corrected for all m being looked at.

    The step-down minP procedure of Westfall and Young (1993): a p-value is held against the smallest one that chance
    makes of the differences whose own is not smaller. All differences are flipped together, so nearly equal ones count
    as nearly one: that is what it gains over Holm's correction. The chance of any false finding is below the level.

    Holding studentised statistics against the largest one (max-T; Romano and Wolf 2005, JASA 100, 94-108) would settle
    with fewer flips, but weighs tests alike only where they have the same null distribution. A difference that rests on
    one large document has another one than a difference that rests on many, and would hardly ever be found.

    Args:
        differences: [n, m].
        groups: [n], such as documents, whose rows keep their signs relative to each other.
        seed: of FLIPS random flips; of few groups all flips are counted, once each.

    Raises:
        DynarouteError: what `bootstrap_difference` raises.
    """
    sums, _ = _by_group(np.asarray(differences, np.float64), groups)  # [groups, m]
    size = np.abs(sums).sum(0)
    scaled = np.divide(sums, size, out=np.zeros_like(sums), where=size > 0)
    found = np.concatenate([(signs @ scaled).T for signs in _sign_flips(len(sums), seed)], axis=1)
    for row in found:  # in place: the p-value of every flip, were it the true order
        row[:] = np.abs(row).round(12)  # what is equal but for the order of its sums is equal
        row[:] = 1 - np.searchsorted(np.sort(row), row) / len(row)
    order = np.argsort(found[:, 0], kind="stable")
    adjusted, smallest = np.empty(len(order)), np.ones(found.shape[1])
    for index in order[::-1]:
        smallest = np.minimum(smallest, found[index])  # of a difference and those that are less certain
        adjusted[index] = (smallest <= found[index, 0]).mean()
    adjusted[order] = np.maximum.accumulate(adjusted[order])
    return adjusted


def _sign_flips(groups: int, seed: int | np.random.SeedSequence) -> Iterator[np.ndarray]:
    """Signs [at most _FLIPS_AT_ONCE, groups]: all there are if FLIPS random ones were more; the first flips nothing."""
    rng, number = np.random.default_rng(seed), min(2**groups, 1 + FLIPS)
    for start in range(0, number, _FLIPS_AT_ONCE):
        index = np.arange(start, min(start + _FLIPS_AT_ONCE, number))
        if number == 2**groups:
            yield 1.0 - 2 * (index[:, None] >> np.arange(groups) & 1)
        else:
            signs = rng.choice((-1.0, 1.0), (len(index), groups))
            yield np.where(index[:, None] == 0, 1.0, signs)


def holm(p: np.ndarray) -> np.ndarray:
    """P-values [n] corrected by Holm (1979): the chance of any false finding among the n is then below the level."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1))
    return adjusted


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """P-values [n] corrected for the expected share of false findings among those that are made."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p)


def t_test_p(values: np.ndarray) -> np.ndarray:
    """Two-sided p-values of Student's t test that the mean of each column of [n, ...] is 0; 1 where all values are 0.

    Raises:
        DynarouteError: there are fewer than two rows.
    """
    from scipy.special import stdtr

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise DynarouteError(f"{len(values)} rows: a test needs at least two, which have a spread")
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(len(values) - 1, -np.abs(mean / error))
    return np.where((mean == 0) & (error == 0), 1.0, p)


def effect_size(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Cohen's d of paired differences: their mean over their standard deviation; NaN where they do not differ.

    Raises:
        DynarouteError: what `paired_difference` raises.
    """
    difference = _differences(ours, theirs)
    deviation = float(difference.std(ddof=1))
    return float(difference.mean()) / deviation if deviation else float("nan")


def minimum_detectable_difference(
    ours: np.ndarray, theirs: np.ndarray, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The true difference that the t interval of n such pairs would exclude 0 for with probability `power`.

    Raises:
        DynarouteError: what `paired_difference` raises.
    """
    from scipy.special import nctdtrinc

    difference = _differences(ours, theirs)
    n = len(difference)
    # The t statistic of a true difference d is noncentral t with noncentrality d / standard error.
    noncentrality = nctdtrinc(n - 1, 1 - power, _t_quantile(n, (1 + confidence) / 2))
    return float(noncentrality) * _standard_error(difference)


def _differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise DynarouteError(f"pairs of shapes {ours.shape} and {theirs.shape}: must be two sequences of n > 1 numbers")
    return ours - theirs


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean of values [n, ...] over each group, such as a document, [groups, ...]: one row for what is independent.

    Raises:
        DynarouteError: there are fewer than two groups, or numbers that are not finite.
    """
    sums, sizes = _by_group(np.asarray(values, np.float64), groups)
    return sums / sizes.reshape(-1, *[1] * (sums.ndim - 1))


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of values [n, ...] over each group, and the sizes of the groups."""
    names, index = np.unique(groups, return_inverse=True)
    if len(index) != len(values) or len(names) < 2:
        raise DynarouteError(f"{len(index)} pairs in {len(names)} groups: must be {len(values)} in at least two groups")
    if not np.isfinite(values).all():  # a test would find them as certain as can be
        raise DynarouteError(f"{len(values)} pairs: must differ by finite numbers, and some do not")
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(np.float64)


def _t_quantile(n: int, probability: float) -> float:
    from scipy.special import stdtrit  # quantiles of Student's t, without scipy.stats

    return float(stdtrit(n - 1, probability))


def _standard_error(difference: np.ndarray) -> float:
    return float(difference.std(ddof=1) / np.sqrt(len(difference)))
