"""The benchmark of a training step: that it trains, and what it records."""

import json
from pathlib import Path

import benchmark_dagformer_step as benchmark
import pytest
import torch
from small_settings import changed, default_settings

from dynaroute.config import Settings
from dynaroute.config.dagformer import LoadedBase
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.errors import DynarouteError


def tiny_settings() -> Settings:
    base = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 3, "num_heads": 2}
    own = {"predictor_hidden": 8, "rank": 2, "batch_size": 4, "micro_batch_size": 2}
    return default_settings(dagformer={"base": base, "seq_len": 8}, **own)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    for name, value in {"ROUNDS": 3, "VOCABULARY": 30, "ENCODER": sizes | heads}.items():
        monkeypatch.setattr(benchmark, name, value)


def test_it_records_the_step_and_the_encoder():
    benchmark.main(tiny_settings())
    report = json.loads(Path("reports/benchmarks/dagformer_step.json").read_text())
    assert (report["batch_size"], report["seq_len"], report["dtype"]) == (4, 8, "float32")
    for name in ("step", "encoder"):
        low, high = report[name]["milliseconds_quartiles"]
        assert 0 < low <= report[name]["milliseconds"] <= high


def test_a_step_trains_the_predictor_and_leaves_the_base(monkeypatch):
    settings = tiny_settings()
    variant = settings.variant("P1")
    torch.manual_seed(0)
    graph = DagForward(benchmark.new_base(settings.dagformer.base, 30, 8, 0).eval())
    predictor = StructurePredictor(variant, 3, 2, 12)
    step = benchmark.predictor_step(predictor, graph, variant, 8, "cpu")
    before = [p.detach().clone() for model in (predictor, graph.base) for p in model.parameters()]
    step()
    after = [p for model in (predictor, graph.base) for p in model.parameters()]
    changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    trained = len(list(predictor.parameters()))
    assert all(changed[:trained])
    assert not any(changed[trained:])


def test_the_encoder_has_the_published_number_of_parameters(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        encoder = benchmark.make_encoder()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 595_776_512


def test_a_base_that_is_loaded_is_refused():
    loaded = LoadedBase(kind="load", path="somewhere", revision=None)
    with pytest.raises(DynarouteError, match=r"dagformer\.base\.kind = 'load': must be pretrain"):
        benchmark.main(changed(tiny_settings(), dagformer={"base": loaded}))
