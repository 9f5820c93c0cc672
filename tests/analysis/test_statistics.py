import itertools

import numpy as np
import pytest
import scipy.stats

from dynaroute.analysis import statistics
from dynaroute.analysis.statistics import (
    Interval,
    answer,
    detectable_difference,
    document_means,
    holm,
    mean_vector_test,
    paired_difference,
    permutation_test,
    sign_flip_p,
)
from dynaroute.errors import DynarouteError

# --- documents: windows of one document are alike ------------------------------------------------------------------


def clustered(rng: np.random.Generator, effect: float, documents: int = 12, windows: int = 6) -> tuple:
    """Two models' NLL on windows whose difference is mostly their document's, and the document of each window."""
    groups = np.repeat(np.arange(documents), windows)
    text = rng.normal(3, 1, len(groups))
    difference = effect + rng.normal(0, 1, documents)[groups] + rng.normal(0, 0.3, len(groups))
    return text + difference, text, groups


@pytest.mark.parametrize("documents", [None, np.arange(30)])
def test_the_interval_of_one_window_per_document_is_that_of_scipy(documents):
    ours, theirs = np.random.default_rng(0).normal(size=(2, 30))
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired_difference(ours, theirs, documents)
    assert found.n == 30
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(ours - theirs), *expected), rel=1e-10)


def test_the_interval_of_equal_documents_is_that_of_their_means():
    ours, theirs, documents = clustered(np.random.default_rng(1), 0.4)
    means = document_means(ours - theirs, documents)
    by_mean = paired_difference(means, np.zeros(12))
    assert paired_difference(ours, theirs, documents) == pytest.approx(by_mean, rel=1e-10)


def test_intervals_by_document_cover_where_windows_taken_as_independent_do_not():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    sizes = np.repeat(np.arange(12), rng.integers(1, 12, 12))
    for _ in range(600):
        difference = 0.4 + rng.normal(0, 1, 12)[sizes] + rng.normal(0, 0.3, len(sizes))
        for index, documents in enumerate((None, sizes)):
            found = paired_difference(difference, np.zeros(len(sizes)), documents)
            covered[index] += found.low <= 0.4 <= found.high
    by_window, by_document = covered / 600
    assert by_window < 0.8
    assert by_document == pytest.approx(0.95, abs=0.04)  # few documents of unequal sizes: a little narrow


def test_no_difference_at_all_is_an_interval_of_zero_width():
    same, documents = np.linspace(1, 2, 8), np.arange(8) // 2
    assert paired_difference(same, same, documents) == Interval(0.0, 0.0, 0.0, 4)
    assert sign_flip_p(same, same, documents, 0) == 1.0
    assert detectable_difference(same, same, documents) == 0.0


@pytest.mark.parametrize("tests", [1, 6])
def test_the_detectable_difference_is_the_one_that_the_interval_shows_four_times_in_five(tests):
    ours, theirs, documents = clustered(np.random.default_rng(9), 0.0)
    error = document_means(ours - theirs, documents).std(ddof=1) / np.sqrt(12)
    threshold = scipy.stats.t.ppf(1 - 0.05 / tests / 2, 11)
    found = detectable_difference(ours, theirs, documents, tests)
    assert scipy.stats.nct.sf(threshold, 11, found / error) == pytest.approx(0.8)


def test_sign_flips_of_few_documents_are_all_counted():
    ours, documents = np.array([3.0, 1.0, 2.0, -0.5, 4.0, 0.25]), np.array([0, 0, 1, 2, 3, 3])
    sums = [4.0, 2.0, -0.5, 4.25]
    as_large = [abs(np.dot(signs, sums)) >= sum(sums) - 1e-9 for signs in itertools.product((1, -1), repeat=4)]
    assert sign_flip_p(ours, np.zeros(6), documents, 0) == pytest.approx(np.mean(as_large))


def test_random_flips_come_close_to_all_of_them(monkeypatch):
    values = np.random.default_rng(21).normal(0.5, 1, 15)
    exact = sign_flip_p(values, np.zeros(15), np.arange(15), 0)
    monkeypatch.setattr(statistics, "FLIPS", 19_999)  # of 32,768
    assert sign_flip_p(values, np.zeros(15), np.arange(15), 0) == pytest.approx(exact, abs=0.01)
    assert 0.01 < exact < 0.5


def test_sign_flips_find_a_planted_difference_and_seldom_one_that_is_not_there(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 999)
    rng = np.random.default_rng(3)
    found = {effect: [sign_flip_p(*clustered(rng, effect), 0) < 0.05 for _ in range(100)] for effect in (0.0, 1.5)}
    assert np.mean(found[1.5]) > 0.9
    assert np.mean(found[0.0]) < 0.12  # 0.05 expected; windows taken as independent would find one in half of them


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([[1.0, 2.0]], [[1.0, 2.0]])])
def test_what_has_no_pairs_to_compare_is_refused(ours, theirs):
    with pytest.raises(DynarouteError, match="two sequences"):
        paired_difference(ours, theirs)


@pytest.mark.parametrize("documents", [np.zeros(4), np.arange(3)])
def test_fewer_than_two_documents_are_refused(documents):
    for test in (paired_difference, detectable_difference, lambda *pairs: sign_flip_p(*pairs, 0)):
        with pytest.raises(DynarouteError, match="at least two documents"):
            test(np.arange(4.0), np.zeros(4), documents)


# --- the primary questions -----------------------------------------------------------------------------------------


def test_holm_is_the_textbook_example():
    # Four tests at 0.05: the smallest p is compared with 0.05 / 4, the next with 0.05 / 3, and so on.
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_an_answer_follows_the_corrected_p_and_the_sign():
    assert [answer(difference, p) for difference, p in ((-1, 0.049), (1, 0.049), (-9, 0.05), (0, 1.0))] == [
        *("better", "worse", "no detectable difference", "no detectable difference")
    ]


# --- permutation tests ---------------------------------------------------------------------------------------------


def between_groups(values: np.ndarray):
    return lambda labels: values[labels == 1].mean() - values[labels == 0].mean()


def test_a_permutation_test_is_that_of_scipy():
    rng = np.random.default_rng(5)
    values, labels = rng.normal(size=14) + 0.7 * (np.arange(14) % 2), np.arange(14) % 2
    found = permutation_test(between_groups(values), labels, 4000, 0)
    exact = scipy.stats.permutation_test(
        (values[labels == 1], values[labels == 0]),
        lambda one, other: one.mean() - other.mean(),
        alternative="greater",
        n_resamples=np.inf,
    )
    assert found.observed == pytest.approx(exact.statistic)
    assert found.p == pytest.approx(exact.pvalue, abs=0.015)
    assert found.chance == pytest.approx(0, abs=0.03)


def test_p_values_are_uniform_without_an_effect_and_small_with_one():
    rng, labels = np.random.default_rng(6), np.arange(24) % 2
    null = [permutation_test(between_groups(rng.normal(size=24)), labels, 99, 0).p for _ in range(200)]
    assert scipy.stats.kstest(null, "uniform").pvalue > 0.01
    planted = permutation_test(between_groups(rng.normal(size=24) + 3 * labels), labels, 99, 0)
    assert planted.p == 0.01  # the smallest that 99 permutations can show


def test_many_statistics_are_tested_with_the_same_permutations():
    values, labels = np.random.default_rng(7).normal(size=(24, 3)), np.arange(24) % 2
    values[:, 1] += 3 * labels
    found = permutation_test(lambda one: np.array([between_groups(column)(one) for column in values.T]), labels, 199, 1)
    alone = [permutation_test(between_groups(column), labels, 199, 1) for column in values.T]
    assert found.p.tolist() == [one.p for one in alone]
    assert found.observed.tolist() == [one.observed for one in alone]
    assert found.p.argmin() == 1


def test_a_mean_vector_is_found_where_it_was_planted_and_seldom_where_it_was_not():
    rng = np.random.default_rng(11)
    groups, shared = np.repeat(np.arange(15), 4), rng.normal(size=200)

    def vectors(mean: float) -> np.ndarray:
        """Entries that go together, by document as well: 200 tests of one entry each would find something always."""
        by_document = rng.normal(size=(15, 1))[groups] * shared
        return mean * shared + by_document + rng.normal(size=(60, 200))

    null = [mean_vector_test(vectors(0.0), groups, 99, 0).p <= 0.05 for _ in range(60)]
    assert np.mean(null) < 0.15
    found = mean_vector_test(vectors(1.5), groups, 999, 0)
    assert found.p == 0.001
    assert found.observed > 2 * found.chance


def test_a_statistic_that_does_not_depend_on_the_labels_has_a_p_of_one():
    assert permutation_test(lambda _: 0.0, np.arange(9), 50, 0).p == 1.0
    values = np.array([0.1, 0.2, 0.3, 0.7])
    assert permutation_test(lambda order: values[order].sum(), np.arange(4), 50, 0).p == 1.0  # sums in any order


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_p(value):
    labels = np.arange(6)
    for spoilt in (
        lambda _: value,
        lambda _: np.array([0.0, value]),
        lambda order: 0.0 if order is labels else value,  # only where labels are permuted
    ):
        with pytest.raises(DynarouteError, match=r"a statistic that is not finite, .* has no p-value"):
            permutation_test(spoilt, labels, 9, 0)
    spoilt = np.array([1.0, value, 2.0, 3.0, 4.0, 5.0])
    for test in (
        lambda: mean_vector_test(spoilt[:, None], labels, 9, 0),
        lambda: sign_flip_p(spoilt, np.zeros(6), labels, 0),
        lambda: paired_difference(spoilt, np.zeros(6), labels),
    ):
        with pytest.raises(DynarouteError, match="6 pairs: must differ by finite numbers, and some do not"):
            test()
