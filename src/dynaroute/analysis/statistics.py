"""The statistics under the reports' claims. The unit is the document: windows of one document are alike.

Every measure compared is one of which less is better, such as NLL. Only the primary questions of params.yaml are
tested (`sign_flip_p`, `holm`, `answer`); all else is an estimate with an interval (`paired_difference`).

    n windows   m documents   E entries of a vector
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from dynaroute.errors import DynarouteError

Answer = Literal["better", "worse", "no detectable difference"]
SIGNIFICANT = 0.05  # of a p-value, after correction for the other primary questions
POWER = 0.8  # with which a difference is called detectable
FLIPS = 99_999  # random sign flips; of few documents all flips are counted instead
_FLIPS_AT_ONCE = 4_096  # drawn; the signs of all of them would take the number of documents times the memory


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval, and the number of independent units under it."""

    mean: float
    low: float
    high: float
    n: int


class PermutationTest(NamedTuple):
    """A statistic, its mean over permutations, and the one-sided p-value; numbers, or arrays of them."""

    observed: Any
    chance: Any
    p: Any


def paired_difference(ours: np.ndarray, theirs: np.ndarray, documents: np.ndarray | None = None) -> Interval:
    """The mean of ours - theirs over n windows, with a two-sided 95 % interval by document.

    The interval is Student's t with m - 1 degrees of freedom and the cluster-robust standard error, which for one
    window per document is the ordinary one.

    Args:
        ours: [n], one number per window.
        theirs: [n], of the same windows in the same order.
        documents: [n], the document of each window; None if every window is a unit of its own.

    Returns:
        The interval; its n is the number of documents.

    Raises:
        DynarouteError: shapes differ, there are fewer than two documents, or a difference is not finite.
    """
    difference, sums, error = _by_document(ours, theirs, documents)
    from scipy.special import (
        stdtrit,
    )  # not scipy.stats, which takes a second; and only here: evaluate_nll starts without

    mean, margin = float(difference.mean()), float(stdtrit(len(sums) - 1, 0.975)) * error
    return Interval(mean, mean - margin, mean + margin, len(sums))


def detectable_difference(ours: np.ndarray, theirs: np.ndarray, documents: np.ndarray, tests: int = 1) -> float:
    """The true difference that the interval of `paired_difference` would exclude 0 for with probability POWER.

    Args:
        ours, theirs, documents: see `paired_difference`, which also says what is raised.
        tests: tested together: the interval is Bonferroni's for that many.
    """
    from scipy.special import nctdtrinc, stdtrit

    _, sums, error = _by_document(ours, theirs, documents)
    threshold = stdtrit(len(sums) - 1, 1 - SIGNIFICANT / tests / 2)
    # The t statistic of a true difference d is noncentral t with noncentrality d / standard error.
    return float(nctdtrinc(len(sums) - 1, 1 - POWER, threshold)) * error


def sign_flip_p(ours: np.ndarray, theirs: np.ndarray, documents: np.ndarray, seed: int) -> float:
    """The two-sided p-value of the paired permutation test, in which ours and theirs swap by whole documents.

    It assumes nothing but that the two are exchangeable if there is no difference: no normal distribution.

    Args:
        ours, theirs, documents: see `paired_difference`, which also says what is raised.
        seed: of the flips.
    """
    _, sums, _ = _by_document(ours, theirs, documents)
    observed = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # equal but for the order of its sums is as large
    as_large = [np.abs(signs @ sums) >= observed for signs in _sign_flips(len(sums), seed)]
    return float(np.concatenate(as_large).mean())


def _sign_flips(m: int, seed: int) -> Iterator[np.ndarray]:
    """Signs [at most _FLIPS_AT_ONCE, m]: all there are if FLIPS random ones were more; the first flips nothing."""
    rng, number = np.random.default_rng(seed), min(2**m, 1 + FLIPS)
    for start in range(0, number, _FLIPS_AT_ONCE):
        index = np.arange(start, min(start + _FLIPS_AT_ONCE, number))
        if number == 2**m:
            yield 1.0 - 2 * (index[:, None] >> np.arange(m) & 1)
        else:
            yield np.where(index[:, None] == 0, 1.0, rng.choice((-1.0, 1.0), (len(index), m)))


def holm(p: np.ndarray) -> np.ndarray:
    """P-values [k] corrected by Holm (1979): the chance of any false finding among the k is then below the level."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1))
    return adjusted


def answer(difference: float, p: float) -> Answer:
    """What a tested difference shows by its corrected p-value."""
    if p >= SIGNIFICANT:
        return "no detectable difference"
    return "better" if difference < 0 else "worse"


def permutation_test(
    statistic: Callable[[np.ndarray], Any], labels: np.ndarray, permutations: int, seed: int
) -> PermutationTest:
    """Compares a statistic with its values when the labels are permuted.

    Args:
        statistic: of labels in some order; a number or an array of them, larger for a stronger effect.
        labels: [n], in their true order.
        permutations: random ones. The true order counts as one more, so p is never 0.
        seed: of the permutations.

    Raises:
        DynarouteError: the statistic is not finite, in the true order or another.
    """
    rng = np.random.default_rng(seed)
    observed = np.asarray(statistic(labels), np.float64)
    null = np.stack([np.asarray(statistic(rng.permutation(labels)), np.float64) for _ in range(permutations)])
    return _against_chance(observed, null)


def mean_vector_test(vectors: np.ndarray, documents: np.ndarray, permutations: int, seed: int) -> PermutationTest:
    """Whether the mean of n vectors differs from 0 at all.

    The statistic is the mean size of its entries, compared with its values when the signs of whole documents are
    flipped. Flips keep what the entries of a vector share, so their number needs no correction.

    Args:
        vectors: [n, E].
        documents: [n], the document of each vector.
        permutations: random flips.
        seed: of the flips.

    Raises:
        DynarouteError: there are fewer than two documents, or an entry is not finite.
    """
    sums, _ = _sums(np.asarray(vectors, np.float64), documents)  # [m, E]
    rng = np.random.default_rng(seed)
    observed = np.abs(sums.sum(0)).mean() / len(vectors)
    # Drawn one by one: all of them at once, [permutations, E], would not fit into memory for a large base.
    signs = (rng.choice((-1.0, 1.0), len(sums)) for _ in range(permutations))
    null = np.array([np.abs(sign @ sums).mean() / len(vectors) for sign in signs])
    return PermutationTest(*map(float, _against_chance(observed, null)))


def _against_chance(observed: np.ndarray, null: np.ndarray) -> PermutationTest:
    """Statistics [...] compared with those of permutations, [permutations, ...]."""
    if not (np.isfinite(observed).all() and np.isfinite(null).all()):  # nothing is as large as NaN: p would be smallest
        raise DynarouteError("a statistic that is not finite, for the labels or a permutation of them, has no p-value")
    slack = 1e-12 * np.abs(observed)  # equal but for the order of its sums is as large
    p = (1 + (null >= observed - slack).sum(0)) / (1 + len(null))
    return PermutationTest(observed[()], null.mean(0)[()], p[()])


def document_means(values: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The mean of values [n, ...] over each document, [m, ...].

    Raises:
        DynarouteError: there are fewer than two documents, or a value is not finite.
    """
    sums, sizes = _sums(np.asarray(values, np.float64), documents)
    return sums / sizes.reshape(-1, *[1] * (sums.ndim - 1))


def _by_document(
    ours: np.ndarray, theirs: np.ndarray, documents: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Differences [n], their sums by document [m], and the cluster-robust standard error of their mean."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise DynarouteError(f"pairs of shapes {ours.shape} and {theirs.shape}: must be two sequences of n > 1 numbers")
    difference = ours - theirs
    sums, sizes = _sums(difference, np.arange(len(difference)) if documents is None else documents)
    m, residuals = len(sums), sums - sizes * difference.mean()
    return difference, sums, float(np.sqrt(m / (m - 1) * np.square(residuals).sum()) / len(difference))


def _sums(values: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of values [n, ...] over each document, and the numbers of windows of the documents."""
    names, index = np.unique(documents, return_inverse=True)
    if len(index) != len(values) or len(names) < 2:
        raise DynarouteError(
            f"{len(index)} windows in {len(names)} documents: must be {len(values)} in at least two documents"
        )
    if not np.isfinite(values).all():  # a test would find them as certain as can be
        raise DynarouteError(f"{len(values)} pairs: must differ by finite numbers, and some do not")
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(np.float64)
