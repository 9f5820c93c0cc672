import numpy as np
import pandas as pd
import pytest
import scipy.stats

from dynaroute.reporting.dwr.findings import course, depth_slopes, gap_closed, over_seeds, relative_load


@pytest.mark.parametrize(
    ("validation", "train", "overfits"),
    [
        ([3.0, 2.0], [3.0, 2.0], False),
        ([2.0, 2.005], [3.0, 2.0], False),
        ([2.0, 2.5], [3.0, 2.0], True),
        ([2.0, 2.5], [3.0, 3.5], False),  # unstable
    ],
)
def test_overfitting_is_a_validation_loss_that_rises_while_training_loss_falls(validation, train, overfits):
    curve = pd.DataFrame({"step": [1, 2], "validation_loss": validation, "train_loss": train})
    assert course(curve).overfits is overfits


def test_load_is_in_units_of_the_uniform_share_of_its_layer():
    router = pd.DataFrame({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1], "load": [0.5, 0.5, 0.1, 0.9]})
    assert relative_load(router).tolist() == [1.0, 1.0, 0.2, 1.8]


def test_growth_with_depth_is_the_mean_slope_with_its_t_interval_over_seeds():
    spreads = np.array([[0.1, 0.2, 0.3], [0.2, 0.2, 0.5], [0.1, 0.4, 0.3]])
    slopes = [scipy.stats.linregress(range(3), layers).slope for layers in spreads]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(slopes), scipy.stats.sem(slopes))
    found = over_seeds(depth_slopes(spreads))
    assert found == pytest.approx({"mean": np.mean(slopes), "low": low, "high": high, "n": 3})
    assert over_seeds(depth_slopes(spreads[:1])) is None


def test_the_gap_closed_may_be_negative_or_not_there():
    rates = {2: (0.2, 0.1, 0.6), 4: (0.5, 0.5, 0.5)}  # LRU, next use, MIN
    rows = [
        {"capacity": capacity, "per_layer": False, "policy": policy, "hit_rate": rate}
        for capacity, found in rates.items()
        for policy, rate in zip(("lru", "next_use", "min"), found, strict=True)
    ]
    assert gap_closed(pd.DataFrame(rows), False, 2) == pytest.approx({"next_use": -0.25})
    assert gap_closed(pd.DataFrame(rows), False, 4) == gap_closed(pd.DataFrame(rows[1:3]), False, 2) == {}
    rows.append({"capacity": 2, "per_layer": True, "policy": "lru", "hit_rate": 0.4})
    assert gap_closed(pd.DataFrame(rows), False, 2, better=True) == pytest.approx({"next_use": -1.5})
