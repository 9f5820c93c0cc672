import itertools

import pandas as pd
import pytest

from dynaroute.reporting.dwr.findings import course, depth_trend, gate_norms_by_layer, relative_load


def test_a_perfect_order_of_four_layers_is_a_trend():
    trend = depth_trend(pd.Series([1.0, 2.0, 2.5, 9.0]))
    assert (trend.rank_correlation, trend.chance, trend.direction) == (pytest.approx(1), pytest.approx(1 / 24), 1)


def test_a_falling_order_is_a_falling_trend():
    assert depth_trend(pd.Series([9.0, 4.0, 3.0, 1.0])).direction == -1


def test_one_exchange_among_four_layers_is_no_trend():
    trend = depth_trend(pd.Series([2.0, 1.0, 3.0, 4.0]))
    assert trend.rank_correlation == pytest.approx(0.8)
    assert trend.chance == pytest.approx(4 / 24)
    assert trend.direction == 0


def test_chances_are_those_of_all_orders():
    values = pd.Series([3.0, 1.0, 5.0, 2.0, 4.0])
    orders = [pd.Series(order) for order in itertools.permutations(range(5))]
    depth = pd.Series(range(5))
    least = depth.corr(values.rank())
    expected = sum(depth.corr(order) > least - 1e-9 for order in orders) / 120
    assert depth_trend(values).chance == pytest.approx(expected)


def test_the_approximation_for_many_layers_continues_the_exact_chance():
    eight, nine = (depth_trend(pd.Series([2.0, 1.0, 4.0, 3.0, *range(5, n + 1)])) for n in (8, 9))
    assert nine.chance == pytest.approx(eight.chance, abs=0.01)
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
