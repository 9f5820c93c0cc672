"""The stage train_dagformer: what it decides by itself. That it trains is seen where the pipeline runs."""

from pathlib import Path

import pytest
import train_dagformer
from test_objective import make, make_variant, validate

from dynaroute.artifacts import write_json
from dynaroute.errors import DynarouteError


def test_every_variant_of_a_chain_has_its_own_data_order_and_noise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variant, starts = make_variant(seed=7), {"P1": "base", "P2": "P1", "P3": "P2", "P4": "P3"}
    for name, start in starts.items():
        write_json(Path(f"data/dagformer/variants/{name}.yaml"), {"from": start, **variant.model_dump()})
    seeds = [train_dagformer.seed_of(start, variant) for start in starts.values()]
    assert seeds[:2] == [7, 7 + 1_000_003]
    assert len(set(seeds)) == 4
    with pytest.raises(DynarouteError, match=r"P9\.yaml"):
        train_dagformer.seed_of("P9", variant)


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
    assert train_dagformer.checks_before_training(objective.variant, row) == expected
    assert (abs(metrics["nll_hard"] - metrics["nll_baseline"]) < 1e-5) == bool(expected)


def test_a_check_before_training_can_fail():
    row = {f"validation_nll_{mode}": value for mode, value in (("soft", 5.1), ("hard", 5.001), ("baseline", 5.0))}
    assert train_dagformer.checks_before_training(make_variant(), row) == dict.fromkeys(BOTH, False)
