"""The stage train_dagformer: what it decides by itself. That it trains is seen where the pipeline runs."""

from pathlib import Path

import pytest
import train_dagformer
from test_objective import make_variant

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
