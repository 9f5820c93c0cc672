"""The benchmark of the MoE layer: what it compares does the same work, and it says how training compares."""

import json
from pathlib import Path

import benchmark_moe
import pytest
import torch
from repository import REPOSITORY
from small_store import make_model
from small_tokens import write_tokens

from dynaroute.config import Settings, load_settings
from dynaroute.dwr.model import DWRConfig, MoE
from dynaroute.errors import DynarouteError


def tiny_settings(**changes) -> Settings:
    settings = load_settings(REPOSITORY / "params.yaml")
    training = settings.dwr.training.model_copy(update={"micro_batch_size": 3})
    sizes = {"d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "max_seq_len": 8}
    dwr = settings.dwr.model_copy(update={**sizes, "training": training})
    return settings.model_copy(update={"dwr": dwr, "num_threads": 1, **changes})


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """The working directory, with the tokens of a corpus of vocabulary 70; and sizes that take no time."""
    monkeypatch.chdir(tmp_path)
    write_tokens(Path("data/tokens") / tiny_settings().dwr.corpus, vocab_size=70, train=[list(range(70))])
    for name, value in {"D": 16, "F_EXPERT": 16, "E": 4, "GATED_WIDTH": 8, "TOKENS": (5,), "ROUNDS": 3}.items():
        monkeypatch.setattr(benchmark_moe, name, value)
    return tmp_path


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_the_plain_loop_that_ours_is_timed_against_returns_the_same_with_the_same_gradients(capacity_factor):
    moe = make_model(num_layers=1, capacity_factor=capacity_factor).layers[0].moe
    x = torch.randn(2, 9, 32, requires_grad=True)
    found = []
    for kind in (MoE, benchmark_moe.LoopMoE):
        moe.__class__ = kind
        y, statistics = moe(x)
        loss = y.square().sum() + statistics.balance_loss
        gradients = torch.autograd.grad(loss, [x, *moe.parameters()], materialize_grads=True)
        found.append([y, *statistics, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert bool(statistics.dropped) == (capacity_factor is not None)


def test_both_models_train_alike_on_the_vocabulary_of_the_corpus(tree, monkeypatch):
    models = {}
    training_step = benchmark_moe.training_step

    def keep(model, *arguments):
        models[type(model.layers[0].moe)] = model
        return training_step(model, *arguments)

    monkeypatch.setattr(benchmark_moe, "training_step", keep)
    settings = tiny_settings()
    steps, tokens = benchmark_moe.training_steps(settings, benchmark_moe.make_accelerator("cpu", "fp32"))
    ours, loop = models[MoE], models[benchmark_moe.LoopMoE]
    assert ours.config == DWRConfig(vocab_size=128, **settings.dwr.model_dump(include=set(DWRConfig.model_fields)))
    assert tokens == 3 * 8
    before = ours.output.weight.detach().clone()
    for model in models.values():
        for layer in model.layers:
            layer.dropout.p = 0.0
        model.dropout.p = 0.0
    for _ in range(3):
        for step in steps.values():
            step()
    assert not torch.equal(ours.output.weight, before)
    for (name, one), other in zip(ours.named_parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_it_records_every_layer_and_the_ratio_of_training_speeds(tree, monkeypatch):
    steps = {"dynaroute": lambda: 2.0, "plain_loop": lambda: 5.0}
    monkeypatch.setattr(benchmark_moe, "training_steps", lambda *_: (steps, 100))
    monkeypatch.setattr(benchmark_moe, "seconds", lambda step, _: step() or 1.0)  # training steps tell their time
    benchmark_moe.main(tiny_settings())
    report = json.loads(Path("reports/benchmarks/moe.json").read_text())
    assert report["training"] == {
        "tokens_per_step": 100,
        "dynaroute_tokens_per_second": 50.0,
        "plain_loop_tokens_per_second": 20.0,
        "tokens_per_second_against_plain_loop": 2.5,
        "tokens_per_second_against_plain_loop_quartiles": [2.5, 2.5],
    }
    layers = ["dense", "dynaroute", "plain_loop", "gated_dense", "transformers_eager", "transformers_grouped_mm"]
    assert [(row["tokens"], row["layer"]) for row in report["rows"]] == [(5, layer) for layer in layers]


def test_it_runs_on_the_device_of_the_settings(tree):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(DynarouteError, match="device = 'cuda'"):
        benchmark_moe.main(tiny_settings(device="cuda"))
    assert not Path("reports").exists()
