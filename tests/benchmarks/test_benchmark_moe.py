"""The benchmark of the MoE layer: what it compares does the same work, and it says how training compares."""

import json
from pathlib import Path

import benchmark_moe
import pytest
import timing
import torch
from small_settings import default_settings
from small_store import make_model
from small_tokens import write_tokens

from dynaroute.config import Settings
from dynaroute.dwr.model import DWRConfig, MoE


def tiny_settings(**changes) -> Settings:
    sizes = {"d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "max_seq_len": 8}
    return default_settings(dwr={**sizes, "dropout": 0.0, "training": {"micro_batch_size": 3}}, **changes)


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
    moe = make_model(num_layers=1, capacity_factor=capacity_factor).train().layers[0].moe
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
    steps, known, config = benchmark_moe.training_steps(settings, benchmark_moe.make_accelerator("cpu", "fp32"))
    ours, loop = models[MoE], models[benchmark_moe.LoopMoE]
    assert config == DWRConfig(vocab_size=128, **settings.dwr.model_dump(include=set(DWRConfig.model_fields)))
    assert list(steps) == list(known) == ["dynaroute", "plain_loop", "dense"]
    assert known["dynaroute"]["parameters"] == config.num_params()
    # All that are active in ours, but for the routers and, in each layer, a bias of one of the two experts.
    missing = config.num_layers * ((config.d_model + 1) * config.num_experts + config.d_model)
    assert known["dense"]["parameters"] == config.num_active_params() - missing
    before = [model.output.weight.detach().clone() for model in models.values()]
    for _ in range(3):
        for step in steps.values():
            step()
    assert not any(torch.equal(model.output.weight, old) for model, old in zip(models.values(), before, strict=True))
    for (name, one), other in zip(ours.named_parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_with_compiled_blocks_computes_the_same(monkeypatch):
    compile_module = torch.nn.Module.compile
    # What is compiled is what is tested: the code that a backend would make of it takes half a minute.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    models = benchmark_moe.training_models(make_model().config)
    tokens = torch.arange(20)[None] % 64
    for name in ("dynaroute", "dense"):
        model = models[name].eval()
        compiled = benchmark_moe.compiled(model)
        assert all(layer._compiled_call_impl for layer in compiled.layers)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_all_experts_at_once_compile_whole(monkeypatch):
    compile_module = torch.nn.Module.compile

    def compile_whole(module):
        compile_module(module, backend="aot_eager", fullgraph=True)  # or it raises; the backward pass is traced too

    monkeypatch.setattr(torch.nn.Module, "compile", compile_whole)
    monkeypatch.setattr(MoE, "_run_at_once", lambda self, x: True)
    model = make_model(num_layers=1)
    compiled = benchmark_moe.compiled(model)
    tokens, found = torch.arange(20)[None] % 64, []
    for one in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            logits = one(tokens).logits
        found.append([logits, *torch.autograd.grad(logits.float().square().mean(), list(one.parameters()))])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


def test_a_model_that_cannot_be_trained_is_told_and_the_others_are_timed(tree, monkeypatch):
    def broken(self, x, simulated):
        raise RuntimeError("no kernel\nof that name")

    monkeypatch.setattr(benchmark_moe.DenseLayer, "forward", broken)
    benchmark_moe.main(tiny_settings())
    training = json.loads(Path("reports/benchmarks/moe.json").read_text())["training"]
    assert training["models"]["dense"]["failed"] == "RuntimeError: no kernel"
    assert list(training["tokens_per_second_ratios"]) == ["dynaroute_to_plain_loop"]


def test_it_records_every_layer_and_the_ratios_of_training_speeds(tree, monkeypatch):
    steps = {"dynaroute": lambda: 2.0, "plain_loop": lambda: 5.0, "dense": lambda: 1.0}
    known = {name: {"parameters": 7} for name in steps}
    config = make_model().config.model_copy(update={"max_seq_len": 100})
    monkeypatch.setattr(benchmark_moe, "training_steps", lambda *_: (steps, known, config))
    monkeypatch.setattr(timing, "seconds", lambda step, _: step() or 1.0)  # training steps tell their time
    benchmark_moe.main(tiny_settings())
    report = json.loads(Path("reports/benchmarks/moe.json").read_text())
    training = report["training"]
    assert training["tokens_per_step"] == 3 * 100
    assert training["models"]["dynaroute"] == {
        "parameters": 7,
        "milliseconds": 2000.0,
        "milliseconds_quartiles": [2000.0, 2000.0],
        "tokens_per_second": 150.0,
    }
    assert training["tokens_per_second_ratios"] == {
        "dynaroute_to_plain_loop": {"ratio": 2.5, "quartiles": [2.5, 2.5]},
        "dynaroute_to_dense": {"ratio": 0.5, "quartiles": [0.5, 0.5]},
    }
    layers = ["dense", "dynaroute", "plain_loop", "gated_dense", "transformers_eager", "transformers_grouped_mm"]
    assert [(row["tokens"], row["layer"]) for row in report["rows"]] == [(5, layer) for layer in layers]
