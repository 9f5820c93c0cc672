import pytest
from test_objective import make, make_variant, validate

from dynaroute.dagformer.health import checks_before_training, health

HARD = {"hard_nll_is_the_baseline_before_training": True}
BOTH = HARD | {"soft_nll_is_within_1_percent_of_the_baseline_before_training": True}


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, BOTH),
        ({"input_norm": "gate_mean"}, BOTH),
        ({"cascade": "off", "exempt_first_layer": False}, BOTH),
        ({"init_logit": 3.0}, HARD),
        ({"init_logit": 0.0}, {}),
        ({"init_logit": -3.0}, {}),
        ({"exempt_first_layer": False}, {}),
        *(({"input_norm": name}, {}) for name in ("rms_post", "ln_post", "rms_pre")),
    ],
)
def test_before_training_only_what_must_hold_is_checked(knobs, expected):
    predictor, objective = make(**knobs)
    metrics = validate(objective, predictor)
    row = {f"validation_{name}": value for name, value in metrics.items()}
    assert checks_before_training(objective.variant, row) == expected
    assert (abs(metrics["nll_hard"] - metrics["nll_baseline"]) < 1e-5) == bool(expected)


def test_a_check_before_training_can_fail():
    row = {f"validation_nll_{mode}": value for mode, value in (("soft", 5.1), ("hard", 5.001), ("baseline", 5.0))}
    assert checks_before_training(make_variant(), row) == dict.fromkeys(BOTH, False)


def row(step, density=0.9, slope=0.01):
    return {"step": step, "validation_density_hard": density, "train_gate_slope": slope}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(0), row(50), row(100), row(150)], "healthy"),
        ([row(0), row(50, slope=1e-5), row(100, slope=1e-5)], "saturated"),
        ([row(0), row(50, slope=1e-5), row(100), row(150, slope=1e-5)], "healthy"),
        ([row(0), row(50), row(100, density=0.0), row(150, density=0.001)], "healthy"),  # known of 50 steps
        ([row(0), row(50), row(100, density=0.0), row(150, density=0.001), row(200, density=0.0)], "collapsed"),
        ([row(0, density=0.0), row(100, density=0.0)], "collapsed"),
        ([row(0), row(50, density=0.0)], "too short to tell"),
        # Validations further apart than that: a density is of one step, a slope of all since the row before.
        ([row(0), row(1000, density=0.0), row(2000)], "healthy"),
        ([row(0), row(1000), row(2000, density=0.0)], "healthy"),
        ([row(0), row(1000, density=0.0), row(2000, density=0.0)], "collapsed"),
        ([row(0), row(1000, slope=1e-5), row(2000)], "saturated"),
    ],
)
def test_an_alarm_needs_100_steps_in_a_row(rows, expected):
    assert health(rows, 100)[0] == expected


def test_the_reason_says_what_was_seen():
    rows = [row(0), row(50, slope=1e-5), row(100), row(150)]
    assert "was below 0.001 for 50 steps in a row" in health(rows, 100)[1]
    assert "below 0.01 at single validations only" in health([row(0), row(1000), row(2000, density=0.0)], 100)[1]
    assert "below 0.01 from step 50 to 150" in health([row(0), row(50, density=0.0), row(150, density=0.0)], 100)[1]
    assert "stayed above" in health([row(0), row(150)], 100)[1]
    assert health(rows, 50)[0] == "saturated"
