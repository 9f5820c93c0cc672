"""The benchmark of peers, small: that every candidate decodes, and what its goals compare."""

import json
from pathlib import Path

import benchmark_cached_inference as benchmark
import pytest
from small_settings import default_settings

from dynaroute.errors import DynarouteError


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 6, "vocab_size": 64}
    monkeypatch.setattr(benchmark, "CONFIG", benchmark.CONFIG.model_copy(update=sizes))
    monkeypatch.setattr(benchmark, "GATED_WIDTH", 32)
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 4)
    monkeypatch.setattr(benchmark, "REPEATS", 2)


def test_all_candidates_take_their_turns():
    benchmark.main(default_settings())
    report = json.loads(Path("reports/benchmarks/cached_inference.json").read_text())
    states = {}
    for row in report["rows"]:
        states.setdefault(row["name"], []).append(row["page_cache"])
        assert row["tokens_per_second"] > 0
        assert row["ratio_lowest"] <= row["ratio_to_resident"] <= row["ratio_highest"]
    assert report["rows"][0]["name"] == "ours, all resident"
    assert report["rows"][0]["ratio_to_resident"] == 1
    assert states["ours, 4 experts, next_use, gate"] == states["Mixtral, experts on disk"] == ["warm", "cold"]
    assert states["ours under accelerate's disk_offload"] == ["warm", "cold"]
    assert {row["hit_rate"] is not None for row in report["rows"] if "experts, " in row["name"]} == {True}
    for row in report["rows"]:
        if row["hit_rate"] is None:
            assert row["late_rate"] is None, row["name"]
        else:
            assert 0 <= row["late_rate"] <= (0 if row["name"].endswith("none") else row["hit_rate"]), row["name"]
    assert len(report["goals"]) == 6
    assert {goal["candidate"] for goal in report["goals"]} == {"ours, 4 experts, next_use, gate"}
    assert all(0 < goal["lowest"] <= goal["value"] <= goal["highest"] for goal in report["goals"])
    assert 0 <= report["mixtral_lru_hit_rate"] <= 1
    assert not benchmark.SCRATCH.exists()


def test_goals_compare_one_setting_round_by_round():
    seconds = {
        ("ours, all resident", "warm"): [1.0, 2.0, 1.0],
        ("ours, 4 experts, lru, none", "warm"): [0.5, 0.5, 0.5],  # faster, and not what was chosen beforehand
        ("ours, 4 experts, next_use, gate", "warm"): [1.25, 2.0, 2.0],
        ("Mixtral, experts on disk", "warm"): [2.0, 4.0, 8.0],
        ("ours under accelerate's disk_offload", "warm"): [12.5, 20.0, 40.0],
        ("ours, 4 experts, next_use, gate", "cold"): [4.0, 5.0, 4.0],
        ("Mixtral, experts on disk", "cold"): [16.0, 40.0, 32.0],
        ("ours under accelerate's disk_offload", "cold"): [80.0, 80.0, 80.0],
    }
    runs = {name: [benchmark.Run(one) for one in times] for name, times in seconds.items()}
    keys = ("value", "lowest", "highest", "resident_value", "goal")
    assert [tuple(goal[key] for key in keys) for goal in benchmark.compare(runs)] == [
        (0.8, 0.5, 1.0, 1.0, 0.95),
        (2.0, 1.6, 4.0, 2.0, 1.5),
        (10.0, 10.0, 20.0, 12.5, 15.0),
        (0.25, 0.25, 0.4, 1.0, 0.35),
        (8.0, 4.0, 8.0, 20.0, 6.0),
        (20.0, 16.0, 20.0, 80.0, 15.0),
    ]


def test_logits_that_differ_stop_it_and_leave_nothing(monkeypatch):
    load_resident = benchmark.load_resident

    def another(store):
        model = load_resident(store)
        model.output.weight[7] *= 1.0001
        return model

    monkeypatch.setattr(benchmark, "load_resident", another)
    with pytest.raises(DynarouteError, match="logits are not those of the resident model"):
        benchmark.main(default_settings())
    assert not Path("reports/benchmarks").exists()
    assert not benchmark.SCRATCH.exists()
