import pytest
from test_objective import make_variant

from dynaroute.dagformer.variants import seed_of
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json


def test_every_variant_of_a_chain_has_its_own_data_order_and_noise(tmp_path):
    variant, starts = make_variant(seed=7), {"P1": "base", "P2": "P1", "P3": "P2", "P4": "P3"}
    for name, start in starts.items():
        write_json(tmp_path / f"{name}.yaml", {"from": start, **variant.model_dump()})
    seeds = [seed_of(tmp_path, start, variant) for start in starts.values()]
    assert seeds[:2] == [7, 7 + 1_000_003]
    assert len(set(seeds)) == 4
    with pytest.raises(DynarouteError, match=r"P9\.yaml"):
        seed_of(tmp_path, "P9", variant)
