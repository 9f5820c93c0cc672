import math

import pandas as pd
import pytest
import scipy.stats

from dynaroute.reporting.dwr.findings import course, depth_correlation, gap_closed, gate_norms_by_layer, relative_load


@pytest.mark.parametrize(
    ("validation", "train", "outcome"),
    [
        ([3.0, 2.0], [3.0, 2.0], "lowest"),
        ([2.0, 2.005], [3.0, 2.0], "level"),
        ([2.0, 2.5], [3.0, 2.0], "overfits"),
        ([2.0, 2.5], [3.0, 3.5], "unstable"),
    ],
)
def test_overfitting_is_a_validation_loss_that_rises_while_training_loss_falls(validation, train, outcome):
    curve = pd.DataFrame({"step": [1, 2], "validation_loss": validation, "train_loss": train})
    assert course(curve).outcome == outcome


@pytest.mark.parametrize("values", [[3.0, 1.0, 5.0, 2.0, 4.0], [2.0, 2.0, 1.0, 5.0, 5.0, 5.0], [1.0, 3.0, 2.0]])
def test_the_correlation_with_depth_is_that_of_scipy(values):
    expected = scipy.stats.spearmanr(range(len(values)), values).statistic
    assert depth_correlation(pd.Series(values)) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0]])
def test_layers_that_do_not_differ_have_no_correlation_with_depth(values):
    assert depth_correlation(pd.Series(values)) is None


def test_spread_and_load_by_layer():
    router = pd.DataFrame(
        {"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "gate_norm": [1.0, 1.5, 2.0, 4.0], "load": [0.5, 0.5, 0.1, 0.9]}
    )
    assert gate_norms_by_layer(router)["spread"].tolist() == [0.5, 2.0]
    assert relative_load(router).tolist() == [1.0, 1.0, 0.2, 1.8]


def test_the_gap_closed_may_be_negative_or_not_there():
    rates = {2: (0.2, 0.1, 0.6), 4: (0.5, 0.5, 0.5)}  # LRU, next use, MIN
    rows = [
        {"capacity": capacity, "per_layer": False, "policy": policy, "hit_rate": rate}
        for capacity, found in rates.items()
        for policy, rate in zip(("lru", "next_use", "min"), found, strict=True)
    ]
    closed = gap_closed(pd.DataFrame(rows), per_layer=False)["next_use"]
    assert closed[2] == pytest.approx(-0.25)
    assert math.isnan(closed[4])
    assert gap_closed(pd.DataFrame(rows[1:3]), per_layer=False).empty
