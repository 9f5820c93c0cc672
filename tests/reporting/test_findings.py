import pandas as pd
import pytest
import scipy.stats

from dynaroute.reporting.dwr.findings import course, depth_trend, gate_norms_by_layer, relative_load


@pytest.mark.parametrize(("values", "direction"), [([1.0, 2.0, 2.5, 6.0, 9.0], 1), ([9.0, 5.0, 4.0, 3.0, 1.0], -1)])
def test_a_perfect_order_of_five_layers_is_a_trend_in_its_direction(values, direction):
    trend = depth_trend(pd.Series(values))
    assert trend.rank_correlation == pytest.approx(direction)
    assert trend.chance == pytest.approx(2 / 120)  # this order and its reverse
    assert trend.direction == direction
    assert not trend.too_few_layers


def test_of_four_layers_no_order_is_a_trend():
    trend = depth_trend(pd.Series([1.0, 2.0, 2.5, 9.0]))
    assert (trend.chance, trend.direction, trend.too_few_layers) == (pytest.approx(2 / 24), 0, True)


def test_chances_do_not_depend_on_the_direction():
    values = pd.Series([2.0, 1.0, 3.0, 6.0, 5.0, 7.0])
    rising, falling = depth_trend(values), depth_trend(-values)
    assert rising.rank_correlation == pytest.approx(-falling.rank_correlation)
    assert rising.chance == falling.chance


@pytest.mark.parametrize("values", [[3.0, 1.0, 5.0, 2.0, 4.0], [2.0, 2.0, 1.0, 5.0, 5.0, 5.0], [1.0, 3.0, 2.0]])
def test_chances_are_those_of_the_permutation_test_of_scipy(values):
    depth = range(len(values))
    expected = scipy.stats.permutation_test(
        (values,),
        lambda order: scipy.stats.spearmanr(order, depth).statistic,
        permutation_type="pairings",
        n_resamples=1000,  # more than there are orders: all of them
        alternative="two-sided",
    )
    found = depth_trend(pd.Series(values))
    assert found.chance == pytest.approx(expected.pvalue)
    assert found.rank_correlation == pytest.approx(expected.statistic)


def test_the_approximation_for_many_layers_continues_the_exact_chance():
    eight, nine = (depth_trend(pd.Series([2.0, 1.0, 4.0, 3.0, *range(5, n + 1)])) for n in (8, 9))
    assert nine.chance == pytest.approx(eight.chance, abs=0.01)
    level = depth_trend(pd.Series([5.0, 1.0, 8.0, 3.0, 9.0, 2.0, 7.0, 6.0, 4.0]))
    expected = scipy.stats.spearmanr(range(9), [5, 1, 8, 3, 9, 2, 7, 6, 4]).pvalue
    assert level.chance == pytest.approx(expected, abs=0.05)
    assert depth_trend(pd.Series(range(20))).direction == 1


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0]])
def test_no_trend_without_two_different_layers(values):
    assert depth_trend(pd.Series(values)) is None


def test_spread_and_load_by_layer():
    router = pd.DataFrame(
        {"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "gate_norm": [1.0, 1.5, 2.0, 4.0], "load": [0.5, 0.5, 0.1, 0.9]}
    )
    assert gate_norms_by_layer(router)["spread"].tolist() == [0.5, 2.0]
    assert relative_load(router).tolist() == [1.0, 1.0, 0.2, 1.8]


@pytest.mark.parametrize(
    ("validation", "train", "turned", "overfitted"),
    [
        ([3.0, 2.0], [3.0, 2.0], False, False),
        ([2.0, 2.005], [3.0, 2.0], False, False),  # level
        ([2.0, 2.5], [3.0, 2.0], True, True),
        ([2.0, 2.5], [3.0, 3.5], True, False),
    ],
)
def test_overfitting_is_a_validation_loss_that_rises_while_training_loss_falls(validation, train, turned, overfitted):
    curve = pd.DataFrame({"step": [1, 2], "validation_loss": validation, "train_loss": train})
    assert (course(curve).turned, course(curve).overfitted) == (turned, overfitted)
