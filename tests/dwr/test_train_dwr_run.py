"""A DWR run from tokens to its result, against plain computations of what it says."""

import csv
import random
from pathlib import Path

import benchmark_locality
import numpy as np
import pytest
import resolve_variants
import torch
import torch.nn.functional as F
import train_dwr
import train_dwr_run
from plain_lru import lru_hit_rate
from repository import REPOSITORY
from resuming import killed_at
from small_settings import changed
from small_tokens import write_tokens

from dynaroute.analysis.dwr_runs import train_and_measure
from dynaroute.analysis.traces import Trace, uniform_trace
from dynaroute.config import Settings, read_yaml
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record
from dynaroute.training.loop import Trainer

T = 16
SPLITS = {"train": 70 * T + 1, "validation": 9 * T + 5, "test": 7 * T + 3}
TRAINING = {
    "epochs": 3.0, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, "min_lr": 0.0, "warmup_steps": 1,
    "validate_every": 4, "checkpoint_every": 100, "early_stopping_patience": None,
}  # fmt: skip
SIZES = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "top_k": 2, "max_seq_len": T}


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """The working directory, with tokens of which some follow others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    draw = random.Random(0)
    splits = {name: [draw.choices(range(1, 60), range(1, 60), k=size)] for name, size in SPLITS.items()}
    write_tokens(tmp_path / "data/tokens/docs", 60, **splits)
    return splits


def make_settings(overrides: dict) -> Settings:
    """Two runs; `overrides` are the other's."""
    params = read_yaml(REPOSITORY / "params.yaml")
    windows = {"train_windows": 20, "validation_windows": 5, "eval_windows": None}
    reference = {"corpus": "docs", **windows, **SIZES, "training": TRAINING}
    params |= {"num_threads": 1, "dwr_runs": {"reference": reference, "other": {"corpus": "docs", **overrides}}}
    params["trace_routing"]["windows"] = 3
    params["benchmark_cache"] |= {"prompt_tokens": 3, "new_tokens": 2, "num_prompts": 2, "capacities": [3]}
    params["simulate_cache"]["capacities"] = [3]
    params["dwr"] |= {**SIZES, "training": params["dwr"]["training"] | TRAINING}
    return Settings.model_validate(params)


def run_one(name: str, **overrides) -> dict:
    """Trains one of two runs and returns what it wrote; `overrides` are the other's."""
    settings = make_settings(overrides)
    resolve_variants.main(settings)
    train_dwr_run.main(settings, name)
    return read_record(f"data/dwr/run_results/{name}.json")


def test_what_it_says_of_weights_that_did_not_move_is_what_plain_loops_say_of_new_ones(tokens):
    found = run_one("other", training={"lr": 1e-12})
    torch.manual_seed(0)
    model = DWRTransformer(DWRConfig(vocab_size=64, dropout=0.1, capacity_factor=None, **SIZES)).eval()
    streams = {split: torch.tensor(documents[0]) for split, documents in tokens.items()}

    def nll(split, starts):
        parts = []
        for start in starts:
            window = streams[split][start : start + T + 1]
            parts.append(F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none"))
        return float(torch.cat(parts).mean())

    with torch.inference_mode():
        assert found["test_loss"] == pytest.approx(nll("test", range(0, SPLITS["test"] - 1, T)), rel=1e-5)
        spread = [T * (index * 10 // 5) for index in range(5)]  # 5 of 10 windows
        assert found["validation_loss"] == pytest.approx(nll("validation", spread), rel=1e-5)

        chosen = []
        for window in (index * 7 // 3 for index in range(3)):
            layers = model(streams["test"][None, window * T : window * T + T]).router
            chosen += torch.stack([statistics.chosen[0] for statistics in layers], 1).tolist()
    assert (found["capacity"], found["experts"], found["trace_tokens"]) == (3, 8, 3 * T)
    assert found["hit_rate"]["lru"] == lru_hit_rate(chosen, 3)  # a third of 8
    trace = Trace("run", np.array(chosen, np.uint16), np.zeros((3 * T, 1, 4), np.uint16))
    assert found["uniform_hit_rate"]["lru"] == lru_hit_rate(uniform_trace(trace).experts.tolist(), 3)
    assert found["uniform_hit_rate"].keys() == found["hit_rate"].keys()
    assert found["hit_rate"]["lru"] <= found["hit_rate"]["min"]
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_it_trains_on_as_many_windows_as_it_is_told_for_as_many_epochs(tokens):
    found = run_one("reference")
    assert (found["steps"], found["epochs"], found["training_tokens"]) == (15, 3.0, 20 * T)
    losses = {row["step"] / 5: row["validation_loss"] for row in found["history"]}
    assert losses.keys() == {0, 0.8, 1.6, 2.4, 3}
    assert found["validation_loss"] == losses[found["best_epoch"]] == min(losses.values())
    assert run_one("reference") == found  # from the start: what it needed to go on is gone


def test_it_stops_early_if_it_is_told_to(tokens):
    found = run_one("other", training={"lr": 1e-12, "early_stopping_patience": 2})  # the loss stays as it is
    assert (found["steps"], found["steps_planned"], found["best_epoch"]) == (8, 15, 0)


def test_each_epoch_and_every_tenth_step_have_a_row_and_seeds_differ(tokens):
    found = run_one("other", training={"lr": 1e-12, "validate_every": "epoch", "epochs": 4.0})
    assert [(row["epoch"], row["step"]) for row in found["history"]] == [(epoch, 5 * epoch) for epoch in range(5)]
    assert [row["step"] for row in found["losses"]] == [1, 11]
    torch.manual_seed(0)
    model = DWRTransformer(DWRConfig(vocab_size=64, dropout=0.1, capacity_factor=None, **SIZES))
    for row in (found["history"][0], found["history"][-1]):  # it does not move
        for layer, block in enumerate(model.layers):
            norms = block.moe.router.weight.detach().norm(dim=1)
            for name in ("min", "max", "mean"):
                assert row[f"validation_gate_norm_{name}_layer{layer}"] == pytest.approx(float(getattr(norms, name)()))
    other = run_one("other", training={"lr": 1e-12}, seed=1)
    assert other["history"][0]["validation_loss"] != found["history"][0]["validation_loss"]


def test_a_run_that_is_trained_for_locality_goes_on_after_a_kill_as_if_there_was_none(tokens):
    locality = {"balance": "loss_free", "balance_coefficient": 0.0, "balance_window": 2, "balance_rate": 0.1}
    locality |= {"reuse_coefficient": 0.1, "cache_prior": 2.0, "cache_prior_experts": 2}
    found = run_one("other", **locality)
    with killed_at(Trainer, "_step", 9):
        run_one("other", **locality)
    assert run_one("other", **locality) == found
    assert found["history"][-1]["train_reuse_loss_layer1"] > 0
    for knob, value in {"balance_rate": 0.2, "reuse_coefficient": 0.0, "cache_prior": 0.0}.items():
        assert run_one("other", **locality | {knob: value})["test_loss"] != found["test_loss"]


def rows_of(size):
    with Path(f"reports/benchmarks/locality_{size}.csv").open(encoding="utf-8", newline="") as file:
        return {(row["setting"], row["routing"]): row for row in csv.DictReader(file)}


def test_the_table_has_rows_for_each_setting_with_its_controls(tokens, monkeypatch):
    names = ("reference", "lambda_0", "recipe")
    monkeypatch.setattr(benchmark_locality, "SETTINGS", {name: benchmark_locality.SETTINGS[name] for name in names})
    benchmark_locality.main(make_settings({}), "reference")
    rows = rows_of("reference")
    kinds = ("exact", "inexact 0.5", "inexact 1", "shuffled text", "shuffled routing")
    assert rows.keys() == {(name, kind) for name in (*names, "fewer_experts") for kind in kinds}
    for name in names:
        exact, inexact = rows[name, "exact"], rows[name, "inexact 1"]
        assert float(exact["perplexity_low"]) < float(exact["perplexity"]) < float(exact["perplexity_high"])
        assert float(exact["lru_third"]) <= float(exact["min_third"]) <= float(exact["min_half"])
        assert 0 <= float(exact["smallest_load"]) <= 1 <= float(exact["largest_load"])
        assert float(exact["tokens_per_second_pcie"]) > float(exact["tokens_per_second_disk"]) > 0
        assert exact["reaches_goal"] in ("True", "False")
        assert float(inexact["kl"]) >= 0
        assert inexact["perplexity"] != exact["perplexity"]
        assert (inexact["smallest_load"], rows[name, "shuffled text"]["perplexity"]) == ("", "")
    assert rows["reference", "exact"]["reaches_goal"] == "False"


def test_the_larger_size_is_that_of_the_model_of_dwr_and_others_are_refused(tokens, monkeypatch):
    def of_fewer_windows(settings, name, dwr, *rest):
        assert dwr.train_windows is None
        train_and_measure(settings, name, dwr.model_copy(update={"validation_windows": 5, "eval_windows": 5}), *rest)

    monkeypatch.setattr(benchmark_locality, "train_and_measure", of_fewer_windows)
    benchmark_locality.main(make_settings({}), "larger")
    assert {name for name, _ in rows_of("larger")} == {*benchmark_locality.LARGER}
    with pytest.raises(DynarouteError, match="size = 'huge': must be reference or larger"):
        benchmark_locality.main(make_settings({}), "huge")


def test_a_run_may_differ_in_shape_and_is_told_when_windows_are_too_few(tokens):
    found = run_one("other", num_experts=3, balance_coefficient=0.0)
    assert (found["settings"]["num_experts"], found["experts"], found["capacity"]) == (3, 6, 2)
    with pytest.raises(DynarouteError, match=r"dwr_runs\.other\.train_windows = 71: must be at most 70"):
        run_one("other", train_windows=71)


@pytest.mark.parametrize(
    ("section", "key", "number", "most"),
    [("trace_routing", "windows", 8, "7, the number of windows of 16"), ("benchmark_cache", "num_prompts", 23, "22, ")],
)
def test_more_text_than_there_is_for_a_later_stage_is_refused_before_training(
    tokens, monkeypatch, section, key, number, most
):
    def train(_):
        raise AssertionError("it trains")

    monkeypatch.setattr(Trainer, "run", train)
    settings = make_settings({})
    resolve_variants.main(settings)
    stages = {"trace_routing": [train_dwr.main, lambda own: train_dwr_run.main(own, "other")]}
    for main in stages.get(section, [train_dwr.main]):
        with pytest.raises(AssertionError, match="it trains"):
            main(settings)
        with pytest.raises(DynarouteError, match=rf"^params.yaml: {section}.{key} = {number}: must be at most {most}"):
            main(changed(settings, **{section: {key: number}}))
