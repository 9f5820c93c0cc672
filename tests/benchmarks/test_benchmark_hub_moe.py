"""The benchmark of peers, small: that every subject decodes the same model, and that it resumes."""

import importlib.util
import json
from pathlib import Path

import benchmark_hub_moe as benchmark
import gguf
import hub_moe_weights as weights
import pytest
import torch
from small_settings import default_settings

from dynaroute.errors import DynarouteError

SCRATCH = Path(".scratch/hub_moe")  # in the folder that is the argument


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
    monkeypatch.setattr(benchmark, "CONFIG", type(benchmark.CONFIG)(**sizes, tie_word_embeddings=False))
    monkeypatch.setattr(benchmark, "TOKENS", {"cold": 2, "warm_up": 2, "warm": 3, "seconds": 20})
    needed = {benchmark.OFFLOAD, *(row for _, *rows, _ in benchmark.GOALS for row in rows)}
    phases = [(1, [row for row in rows if row in needed]) for _, rows in benchmark.PHASES]
    monkeypatch.setattr(benchmark, "PHASES", phases)


def test_all_subjects_take_their_turns_and_an_interrupted_run_resumes(monkeypatch):
    decode, decoded = benchmark.decode, []

    def interrupted(folder, row):
        decoded.append(row)
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return decode(folder, row)

    monkeypatch.setattr(benchmark, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(default_settings(), str(SCRATCH.parent))
    benchmark.main(default_settings(), str(SCRATCH.parent))
    assert len(decoded) == 1 + sum(len(rows) for _, rows in benchmark.PHASES)
    assert not SCRATCH.exists()
    assert Path("reports/benchmarks/hub_moe.png").stat().st_size > 0
    report = json.loads(Path("reports/benchmarks/hub_moe.json").read_text())
    assert len({(row["name"], row["limit_bytes"]) for row in report["rows"]}) == len(report["rows"]) == 7
    assert report["memory_bandwidth"] > report["disk_bandwidth"] > 0
    for row in report["rows"]:
        if row["name"].startswith("llama.cpp") and not importlib.util.find_spec("llama_cpp"):
            assert row["note"] == "not installed"
            continue
        assert 0 < row["lowest"] <= row["warm"] <= row["highest"], row
        assert (row["cold"] is None) == ("resident" in row["name"])
        assert row["difference"] < (0.05 if "int8" in row["name"] or "llama" in row["name"] else 0.03), row
        cached = row["name"].startswith("ours") and "resident" not in row["name"]
        assert (row["hit_rate"] is not None) == cached
    assert [goal["goal"] for goal in report["goals"]][:3] == [0.5, 0.5, 10.0]
    assert all(0 < goal["lowest"] <= goal["value"] <= goal["highest"] for goal in report["goals"])


def test_q8_0_is_that_of_gguf():
    matrix = torch.randn(6, 64).bfloat16()
    matrix[1, :32] = 0
    expected = gguf.quants.quantize(matrix.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    difference = weights.to_q8_0(matrix).numpy().astype(int) - expected.astype(int)
    assert abs(difference).max() <= 1  # of a value half-way between two
    assert (difference != 0).mean() < 0.01


def test_routing_is_skewed_and_without_a_skew_is_not(tmp_path):
    rates = []
    for skew in (0.0, 2.0):
        weights.write_checkpoint(tmp_path / "model", benchmark.CONFIG, skew)
        plan = {"subject": "ours", "folder": str(tmp_path / "model"), "experts_bytes": 5 * 3 * 64 * 32 * 2}
        rates.append(hit_rate(plan))
    assert rates[1] > rates[0] + 0.1


@torch.inference_mode()
def hit_rate(plan: dict) -> float:
    import hub_moe_subjects

    subject = hub_moe_subjects.ours(plan)
    for token in torch.randint(320, (60,), generator=torch.Generator().manual_seed(1)).tolist():
        subject.step(token)
    return subject.hit_rate()


def test_too_little_disk_space_stops_it_at_once(monkeypatch):
    monkeypatch.setattr(benchmark.shutil, "disk_usage", lambda _: type("", (), {"free": 10_000})())
    with pytest.raises(DynarouteError, match=r"hub_moe: \d+ GB are needed, 0 GB are free"):
        benchmark.main(default_settings(), str(SCRATCH.parent))
    assert not (SCRATCH / "shards").exists()
