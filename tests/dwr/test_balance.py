"""Balance by a bias or by accumulated loads, against plain loops, over resumption, export and caches."""

import pytest
import torch
from small_store import make_model, uniform_usage
from small_training import LOCALITY, SEQ_LEN, VOCAB, Tokens, assert_same_checkpoint, make_dwr_trainer
from test_model import expert_weights, make

from dynaroute.analysis.traces import record_routing
from dynaroute.data.tokens.windows import Subset
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.store import ExpertStore, export_store
from dynaroute.dwr.experts.usage import UsageCounter
from dynaroute.dwr.inference import bind_experts, load_backbone, load_resident, routers
from dynaroute.dwr.model import DWRTransformer, MoE, expert_ffn
from dynaroute.dwr.objective import DWRObjective
from dynaroute.training.loop import Batch, Trainer
from dynaroute.training.nll import nll

ACCUMULATED = {"balance": "auxiliary_accumulated", "balance_window": 5}


def make_biased_model(**changes) -> DWRTransformer:
    """A model whose biases are large enough to change what is chosen."""
    model = make_model(balance="loss_free", **changes)
    for layer in model.layers:
        layer.moe.selection_bias.normal_(generator=torch.Generator().manual_seed(3))
    return model


def make_batch(seed=0, windows=(0, 1, 2)) -> Batch:
    return Batch(*Tokens(9, seed).batch(windows), torch.tensor(windows))


def test_by_default_the_model_has_no_biases_and_the_loss_is_nll_and_the_balance_loss_to_the_bit(tmp_path):
    with make_dwr_trainer(tmp_path) as trainer:
        assert not list(trainer.unwrapped.buffers())
        batch = make_batch()
        loss, _ = trainer.objective.loss(trainer.unwrapped, batch, 0)
        logits, router = trainer.unwrapped(batch.tokens)
        balance = []
        for layer in router:
            tokens = batch.tokens.numel()
            share = torch.stack([(layer.chosen == expert).sum() / tokens for expert in range(16)])
            balance.append(16 * (share * layer.probability.flatten(0, 1).mean(0)).sum())
        assert torch.equal(loss, nll(logits, batch.targets) + 0.01 * torch.stack(balance).sum())


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_bias_decides_what_is_chosen_and_not_its_weight(top_k):
    moe = make(MoE, top_k=top_k, balance="loss_free")
    moe.selection_bias.copy_(torch.tensor([2.0, -1.0, 0.0, 0.5, -3.0]))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    found, statistics = moe(x)
    for token, own, y in zip(x.view(-1, 32), statistics.chosen.view(-1, top_k), found.view(-1, 32), strict=True):
        scores = (moe.router.weight @ token + moe.router.bias).tolist()
        biased = [score + bias for score, bias in zip(scores, moe.selection_bias.tolist(), strict=True)]
        chosen = sorted(range(5), key=lambda expert: -biased[expert])[:top_k]
        assert own.tolist() == chosen
        probability = torch.tensor(scores, dtype=torch.float64).softmax(0)
        total = sum(probability[expert] for expert in chosen) if top_k > 1 else 1
        outputs = [expert_ffn(token[None], expert_weights(moe, expert))[0] for expert in chosen]
        expected = sum(probability[expert] / total * out for expert, out in zip(chosen, outputs, strict=True))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    moe.selection_bias.zero_()
    assert not torch.equal(moe(x)[1].chosen, statistics.chosen)


def test_biases_move_by_the_sign_of_the_load_error_of_each_window(tmp_path):
    model = make_model(balance="loss_free", vocab_size=VOCAB, dropout=0.0).train()
    objective = DWRObjective(model.config, 0.0, balance_window=2, balance_rate=0.25)
    bias, counted = [[0.0] * 5 for _ in range(2)], [[0] * 5 for _ in range(2)]
    for step in range(5):
        for part in range(2):  # micro-batches
            batch = make_batch(step, (part, part + 3))
            objective.loss(model, batch, step)
            for layer, statistics in enumerate(model(batch.tokens).router):
                for expert in statistics.chosen.flatten().tolist():
                    counted[layer][expert] += 1
        objective.end_step(model, step + 1, lambda tensor: tensor)
        if step % 2:
            for layer in range(2):
                mean = sum(counted[layer]) / 5
                bias[layer] = [
                    own + 0.25 * ((count < mean) - (count > mean))
                    for own, count in zip(bias[layer], counted[layer], strict=True)
                ]
                counted[layer] = [0] * 5
        assert [layer.moe.selection_bias.tolist() for layer in model.layers] == bias
        assert [layer.moe.assigned.tolist() for layer in model.layers] == counted
    assert any(map(any, bias))


def test_the_accumulated_loss_counts_earlier_steps_which_fade():
    model = make_model(balance="auxiliary_accumulated", vocab_size=VOCAB, dropout=0.0).train()
    objective, earlier = DWRObjective(model.config, 0.5, balance_window=4), torch.zeros(2, 5, dtype=torch.float64)
    for step in range(3):
        counts = torch.zeros_like(earlier)
        for windows in ([0, 1], [2, 3]):  # micro-batches do not see each other
            batch, own = make_batch(step, windows), torch.zeros_like(earlier)
            logits, router = model(batch.tokens)
            expected = nll(logits, batch.targets).double()
            for layer, statistics in enumerate(router):
                for expert in statistics.chosen.flatten().tolist():
                    own[layer, expert] += 1
                load = earlier[layer] + own[layer]
                probability = statistics.probability.flatten(0, 1).double().mean(0)
                expected += 0.5 * 5 * sum(2 * load[e] / load.sum() * probability[e] for e in range(5))
            torch.testing.assert_close(objective.loss(model, batch, step)[0].double(), expected, rtol=1e-5, atol=1e-5)
            counts += own
        objective.end_step(model, step + 1, lambda tensor: tensor)
        earlier = (earlier + counts) * 3 / 4


@pytest.mark.parametrize("knobs", [LOCALITY, ACCUMULATED], ids=lambda knobs: knobs["balance"])
def test_a_run_that_is_stopped_within_a_window_goes_on_as_if_it_was_not(tmp_path, monkeypatch, knobs):
    with make_dwr_trainer(tmp_path / "whole", **knobs) as trainer:
        trainer.run()
    step = Trainer._step
    with monkeypatch.context() as patch, make_dwr_trainer(tmp_path / "stopped", **knobs) as stopped:
        patch.setattr(Trainer, "_step", lambda self: step(self) if self.state.step < 6 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stopped.run()
    with make_dwr_trainer(tmp_path / "stopped", **knobs) as resumed:
        assert resumed.state.step == 6  # a checkpoint every third step, a window every fourth
        resumed.run()
    for name in ("last", "best"):
        assert_same_checkpoint(tmp_path / f"whole/{name}.safetensors", tmp_path / f"stopped/{name}.safetensors")


def test_a_biased_model_gives_the_same_bits_from_its_store_with_any_cache(tmp_path):
    model = make_biased_model()
    export_store(model, "run", uniform_usage(model), tmp_path / "store")
    store, tokens = ExpertStore(tmp_path / "store"), torch.randint(64, (2, 20))
    assert store.config.balance == "loss_free"
    with torch.inference_mode():
        expected = model(tokens)
        assert torch.equal(load_resident(store)(tokens).logits, expected.logits)
        cached = load_backbone(store)
        for capacity, name in ((1, "none"), (4, "gate"), (10, "transition")):
            counter = UsageCounter("", 2, 5)
            prefetcher = make_prefetcher(name, store, routers(cached), 2)
            with ExpertCache(store, capacity, prefetcher=prefetcher, counter=counter) as cache:
                bind_experts(cached, cache)
                assert torch.equal(cached(tokens).logits, expected.logits)
            counter.save(tmp_path / "usage.json")  # counts what was used, not what scores alone would choose
            assert counter._load.tolist() == [layer.counts.tolist() for layer in expected.router]


def test_lookahead_ranks_experts_with_the_bias():
    model = make_biased_model(num_layers=3, max_seq_len=SEQ_LEN, vocab_size=VOCAB)
    trace = record_routing(model, Subset(Tokens(4), range(4)), "run")
    states = {}
    hooks = [
        layer.moe.register_forward_pre_hook(lambda _, inputs, index=index: states.__setitem__(index, inputs[0][0, -1]))
        for index, layer in enumerate(model.layers)
    ]
    assert len(hooks) == 3
    tokens, _ = Tokens(4).batch([3])
    model(tokens)
    for index in range(2):
        moe = model.layers[index + 1].moe
        scores = moe.router.weight @ states[index] + moe.router.bias + moe.selection_bias
        assert trace.lookahead[-1, index].argsort().tolist() == scores.argsort().tolist()
