import itertools
import math

import numpy as np
import pytest
import scipy.stats

from dynaroute.analysis import statistics
from dynaroute.analysis.statistics import (
    Interval,
    benjamini_hochberg,
    bootstrap_difference,
    bootstrap_ratio,
    compare,
    corrected_verdict,
    effect_size,
    group_means,
    holm,
    mean_vector_test,
    minimum_detectable_difference,
    paired_difference,
    permutation_test,
    settled_westfall_young,
    sign_flip_p,
    t_test_p,
    verdict,
    westfall_young,
)
from dynaroute.errors import DynarouteError


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


# --- documents: windows of one document are alike ------------------------------------------------------------------


def clustered(rng: np.random.Generator, effect: float, documents: int = 12, windows: int = 6) -> tuple:
    """Two models' NLL on windows whose difference is mostly their document's, and which document each is of."""
    groups = np.repeat(np.arange(documents), windows)
    text = rng.normal(3, 1, len(groups))
    difference = effect + rng.normal(0, 1, documents)[groups] + rng.normal(0, 0.3, len(groups))
    return text + difference, text, groups


def test_the_bootstrap_by_document_covers_where_windows_taken_as_independent_do_not():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for trial in range(150):
        ours, theirs, groups = clustered(rng, 0.4)
        intervals = paired_difference(ours, theirs), bootstrap_difference(ours, theirs, groups, trial)
        covered += [found.low <= 0.4 <= found.high for found in intervals]
    by_window, by_document = covered / 150
    assert by_window < 0.75
    assert by_document > 0.85  # of 0.95: with 12 documents the percentile bootstrap is known to be a little narrow


def test_the_bootstrap_of_independent_windows_agrees_with_the_t_interval():
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(size=(2, 300))
    by_t, by_bootstrap = paired_difference(ours, theirs), bootstrap_difference(ours, theirs, np.arange(300), 0)
    assert by_bootstrap.mean == pytest.approx(by_t.mean)
    assert by_bootstrap.n == 300
    assert (by_bootstrap.low, by_bootstrap.high) == pytest.approx((by_t.low, by_t.high), abs=0.015)


def test_sign_flips_of_few_documents_are_all_counted():
    ours, groups = np.array([3.0, 1.0, 2.0, -0.5, 4.0, 0.25]), np.array([0, 0, 1, 2, 3, 3])
    sums = [4.0, 2.0, -0.5, 4.25]
    as_large = [abs(np.dot(signs, sums)) >= sum(sums) - 1e-9 for signs in itertools.product((1, -1), repeat=4)]
    assert sign_flip_p(ours, np.zeros(6), groups, 0) == pytest.approx(np.mean(as_large))


def test_sign_flips_find_a_planted_difference_and_seldom_one_that_is_not_there():
    rng = np.random.default_rng(3)
    found = {effect: [] for effect in (0.0, 1.5)}
    for effect, trial in itertools.product(found, range(60)):
        found[effect].append(sign_flip_p(*clustered(rng, effect), trial) < 0.05)
    assert np.mean(found[1.5]) > 0.9
    assert np.mean(found[0.0]) < 0.15  # 0.05 expected; windows taken as independent would find one in half of them


def test_a_comparison_is_made_of_its_parts():
    ours, theirs, groups = clustered(np.random.default_rng(4), 1.0)
    found, interval = compare(ours, theirs, groups, 7), paired_difference(ours, theirs)
    resampled = bootstrap_difference(ours, theirs, groups, 7)
    assert found[:4] == interval
    assert (found.bootstrap_low, found.bootstrap_high, found.groups) == (resampled.low, resampled.high, 12)
    assert found.p == sign_flip_p(ours, theirs, groups, 7)
    assert found.effect_size == effect_size(ours, theirs)
    assert found.detectable == minimum_detectable_difference(ours, theirs)
    assert compare(ours, theirs, groups, 7) == found


def test_two_equal_models_show_no_difference():
    same = np.linspace(1, 2, 8)
    found = compare(same, same, np.arange(8) // 2, 0)
    assert (found.mean, found.low, found.high, found.bootstrap_low, found.bootstrap_high) == (0, 0, 0, 0, 0)
    assert (found.p, found.effect_size, found.detectable) == (1.0, None, 0.0)


@pytest.mark.parametrize("groups", [np.zeros(4), np.arange(3)])
def test_what_has_no_documents_to_draw_is_refused(groups):
    with pytest.raises(DynarouteError, match="at least two"):
        bootstrap_difference(np.arange(4.0), np.zeros(4), groups, 0)


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


def test_the_mean_vector_of_one_entry_is_tested_as_a_difference_is():
    ours, theirs, groups = clustered(np.random.default_rng(12), 0.5)
    found = mean_vector_test((ours - theirs)[:, None], groups, 4999, 0)
    assert found.observed == pytest.approx(abs((ours - theirs).mean()))
    assert found.p == pytest.approx(sign_flip_p(ours, theirs, groups, 0), abs=0.02)


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
        lambda order: 0.0 if order is labels else value,  # only where labels are dealt out anew
    ):
        with pytest.raises(DynarouteError, match=r"a statistic that is not finite, .* has no p-value"):
            permutation_test(spoilt, labels, 9, 0)
    spoilt = np.array([1.0, value, 2.0, 3.0, 4.0, 5.0])
    for test in (
        lambda: mean_vector_test(spoilt[:, None], labels, 9, 0),
        lambda: sign_flip_p(spoilt, np.zeros(6), labels, 0),
        lambda: westfall_young(spoilt[:, None], labels, 0),
    ):
        with pytest.raises(DynarouteError, match="6 pairs: must differ by finite numbers, and some do not"):
            test()


# --- many tests, effects, power ------------------------------------------------------------------------------------


def test_holm_is_the_textbook_example():
    # Four tests at 0.05: the smallest p is held against 0.05 / 4, the next against 0.05 / 3, and so on.
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_benjamini_hochberg_is_the_textbook_example():
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.02, 0.04, 0.04, 0.02])


def test_holm_keeps_false_findings_among_many_tests_rare():
    rng = np.random.default_rng(8)
    p = rng.uniform(size=(400, 30))  # 30 tests without any effect
    assert np.mean(p.min(1) < 0.05) > 0.7
    assert np.mean([holm(row).min() < 0.05 for row in p]) < 0.08


def documents_apart(rng: np.random.Generator, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Forty differences over 48 windows, in pairs that are nearly equal; documents differ, and one has a third of all.

    The first pair of them has the effect.
    """
    groups = np.repeat(np.arange(17), [16, *[2] * 16])
    own = rng.normal(size=(17, 20))[groups] + 0.3 * rng.normal(size=(48, 20))
    own[:, 0] += effect
    return np.repeat(own, 2, axis=1) + 0.05 * rng.normal(size=(48, 40)), groups


def test_the_largest_of_many_differences_is_found_if_it_was_planted_and_seldom_if_not(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 9_999)
    rng = np.random.default_rng(13)
    null = [westfall_young(*documents_apart(rng, 0.0), 0).min() < 0.05 for _ in range(60)]
    assert np.mean(null) < 0.15  # 0.05, and three standard errors
    alone = [scipy.stats.ttest_1samp(documents_apart(rng, 0.0)[0], 0).pvalue.min() * 40 < 0.05 for _ in range(20)]
    assert np.mean(alone) > 0.8  # windows taken as independent: Bonferroni's correction does not help
    p = westfall_young(*documents_apart(rng, 2.0), 0)
    assert (p[:2] < 0.05).all()
    assert (p[2:] > 0.05).mean() > 0.9


def test_differences_that_go_together_cost_less_than_by_holm():
    values, groups = documents_apart(np.random.default_rng(14), 2.0)
    single = np.array([sign_flip_p(column, np.zeros(48), groups, 0) for column in values.T])
    corrected = westfall_young(values, groups, 0)
    assert (corrected >= single - 0.01).all()
    assert (corrected[:2] < holm(single)[:2]).all()


def test_one_difference_alone_is_not_corrected():
    ours, theirs, groups = clustered(np.random.default_rng(15), 0.5)
    found = westfall_young((ours - theirs)[:, None], groups, 0)
    assert found[0] == pytest.approx(sign_flip_p(ours, theirs, groups, 0), abs=0.02)
    nothing = westfall_young(np.zeros((6, 2)), np.arange(6), 0)
    assert nothing.tolist() == [1.0, 1.0]


def test_step_down_is_that_of_a_plain_loop_over_all_flips():
    values = np.random.default_rng(16).normal(0.9, 1, (8, 3))
    flips = np.array(list(itertools.product((1, -1), repeat=8)))  # the first one flips nothing
    sums = np.abs(flips @ values).round(9)
    p = np.array([[(column >= value).mean() for value in column] for column in sums.T]).T
    expected, largest, rest = np.empty(3), 0.0, {0, 1, 2}
    for column in sorted(rest, key=lambda index: p[0, index]):
        largest = max(largest, (p[:, sorted(rest)].min(1) <= p[0, column]).mean())
        expected[column] = largest
        rest.remove(column)
    assert westfall_young(values, np.arange(8), 0) == pytest.approx(expected)
    assert settled_westfall_young(values, np.arange(8), 0).error.tolist() == [0, 0, 0]


def test_random_flips_come_close_to_all_of_them(monkeypatch):
    values = np.random.default_rng(21).normal(0.7, 1, (14, 3))
    exact = westfall_young(values, np.arange(14), 0)
    monkeypatch.setattr(statistics, "FLIPS", 9_999)  # of 16,384
    assert westfall_young(values, np.arange(14), 0) == pytest.approx(exact, abs=0.01)


def test_a_corrected_p_value_hardly_depends_on_the_seed_of_its_flips():
    values, groups = documents_apart(np.random.default_rng(20), 0.8)
    found = np.stack([westfall_young(values[:, :12], groups, seed) for seed in range(3)])  # [seeds, tests]
    assert 0.005 < found.min() < 0.2  # where a verdict could turn
    assert np.ptp(found, axis=0).max() < 0.01


def test_the_monte_carlo_error_is_that_of_independent_sets(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 4_999)
    values, groups = documents_apart(np.random.default_rng(20), 1.0)
    found = [settled_westfall_young(values[:, :6], groups, seed) for seed in range(30)]
    spread = np.std([p for p, _ in found], axis=0, ddof=1)  # of the means over sets
    errors = np.sqrt(np.mean([error**2 for _, error in found], axis=0))
    assert errors == pytest.approx(spread, rel=0.4)
    assert (errors > 0).all()


def test_means_of_groups_are_those_of_a_loop():
    values, groups = np.random.default_rng(17).normal(size=(7, 2)), np.array([5, 5, 1, 5, 1, 9, 9])
    expected = [[values[groups == group, column].mean() for column in range(2)] for group in (1, 5, 9)]
    assert group_means(values, groups) == pytest.approx(np.array(expected))
    assert group_means(values[:, 0], groups) == pytest.approx(np.array(expected)[:, 0])


def test_the_interval_of_a_ratio_holds_the_true_one_and_is_by_group():
    rng, covered = np.random.default_rng(18), 0
    groups = np.repeat(np.arange(30), 2)
    for _ in range(60):
        wholes = rng.normal(4, 1, 30)[groups]
        parts = 0.25 * wholes + rng.normal(0, 0.5, 30)[groups]  # of the document
        found = bootstrap_ratio(parts, wholes, groups, 0)
        assert found.mean == pytest.approx(parts.sum() / wholes.sum())
        assert found.n == 30
        covered += found.low < 0.25 < found.high
    assert covered / 60 > 0.83


def test_the_t_test_of_many_columns_is_that_of_scipy():
    values = np.random.default_rng(9).normal(0.2, 1, (15, 4, 3))
    assert t_test_p(values) == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue)
    values[:, 0], values[:, 1] = 0.0, 2.0
    assert t_test_p(values)[:2].tolist() == [[1.0] * 3, [0.0] * 3]
    with pytest.raises(DynarouteError, match="at least two"):
        t_test_p(values[:1])


def test_the_effect_size_is_the_mean_in_standard_deviations():
    difference = np.array([1.0, 3.0, 2.0, 6.0])
    assert effect_size(difference, np.zeros(4)) == pytest.approx(3 / math.sqrt((4 + 0 + 1 + 9) / 3))
    assert math.isnan(effect_size(difference, difference))


def test_a_difference_of_the_detectable_size_is_detected_four_times_in_five():
    rng = np.random.default_rng(10)
    difference = rng.normal(size=20)
    difference /= difference.std(ddof=1)
    detectable = minimum_detectable_difference(difference, np.zeros(20))
    samples = rng.normal(detectable, 1, (4000, 20))
    detected = [verdict(paired_difference(sample, np.zeros(20))) == "worse" for sample in samples]
    assert np.mean(detected) == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(
    ("difference", "p", "error", "expected"),
    [
        *((-0.1, 0.04, 0, "better"), (0.1, 0.04, 0, "worse"), (-0.1, 0.05, 0, "no difference shown")),
        *((0, 1, 0, "no difference shown"), (-0.1, 0.04, 0.002, "better"), (0.1, 0.06, 0.002, "no difference shown")),
        *((-0.1, 0.046, 0.002, "too close to say"), (0.1, 0.054, 0.002, "too close to say")),
    ],
)
def test_the_corrected_verdict_follows_p_and_sign_unless_other_flips_could_turn_it(difference, p, error, expected):
    assert corrected_verdict(difference, p, error) == expected
