"""Losses and choices that favour experts used before, against plain loops."""

import math
from collections import OrderedDict

import pytest
import torch
from small_store import export, make_model
from small_training import VOCAB, Tokens

from dynaroute.analysis.replay import replay
from dynaroute.analysis.traces import Trace
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.policies import LRU
from dynaroute.dwr.experts.residency import Residency
from dynaroute.dwr.inference import bind_experts, compare_routing, load_backbone, read_text
from dynaroute.dwr.locality import SimulatedCache, choose_with_cache, reuse_loss
from dynaroute.dwr.objective import DWRObjective
from dynaroute.training.loop import Batch
from dynaroute.training.nll import nll


def draw(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_batch(windows) -> Batch:
    return Batch(*Tokens(9).batch(windows), torch.tensor(windows))


# --- the reuse loss -------------------------------------------------------------------------------------------------


def plain_mean(chosen, num_experts, half_life):
    """The weights of experts in the past of one sequence, [T][E]: those of token t are of what came before it."""
    means = []
    for token in range(1, len(chosen)):
        weights = [0.5 ** ((token - 1 - past) / half_life) for past in range(token)]
        mean = [0.0] * num_experts
        for weight, experts in zip(weights, chosen, strict=False):
            for expert in experts:
                mean[expert] += weight / sum(weights) / len(experts)
        means.append(mean)
    return means


@pytest.mark.parametrize("half_life", [0.01, 1.0, 5.0, 1e6])
def test_the_reuse_loss_is_the_divergence_from_what_was_used_and_its_gradient_the_difference_to_it(half_life):
    scores = draw(2, 9, 4).requires_grad_()
    chosen = draw(2, 9, 4, seed=1).topk(2).indices
    found = reuse_loss(scores, chosen, half_life)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    assert not found[:, 0].any()
    assert not gradient[:, 0].any()
    for sequence in range(2):
        probabilities = scores[sequence].softmax(-1).tolist()
        for token, mean in enumerate(plain_mean(chosen[sequence].tolist(), 4, half_life), 1):
            p = probabilities[token]
            expected = sum(m * math.log(m / own) for m, own in zip(mean, p, strict=True) if m)
            assert found[sequence, token].item() == pytest.approx(expected, abs=1e-12)
            assert gradient[sequence, token].tolist() == pytest.approx(
                [own - m for own, m in zip(p, mean, strict=True)], abs=1e-12
            )


def test_the_reuse_loss_of_a_token_does_not_depend_on_later_tokens_nor_on_other_sequences():
    scores = draw(3, 9, 4)
    changed = scores.clone()
    changed[0, 5:] += 1 + draw(4, 4, seed=1)
    changed[1] += draw(9, 4, seed=2)
    one, other = (reuse_loss(own, own.topk(2).indices, 3.0) for own in (scores, changed))
    assert torch.equal(one[0, :5], other[0, :5])
    assert torch.equal(one[2], other[2])
    assert (one[0, 5:] != other[0, 5:]).all()


def test_the_reuse_loss_is_added_as_often_as_it_has_weight_and_takes_text_of_one_token():
    model, batch = make_model(vocab_size=VOCAB, dropout=0.0), make_batch([0, 1])
    without, _ = DWRObjective(model.config, 0.01).loss(model, batch, 0)
    objective = DWRObjective(model.config, 0.01, reuse_coefficient=0.5, reuse_half_life=2.0)
    found, metrics = objective.loss(model, batch, 0)
    expected = [reuse_loss(layer.scores, layer.chosen, 2.0).mean() for layer in model(batch.tokens).router]
    assert [metrics[f"reuse_loss_layer{layer}"] for layer in range(2)] == expected
    torch.testing.assert_close(found, without + 0.5 * sum(expected))
    one = draw(2, 1, 4)
    assert torch.equal(reuse_loss(one, one.topk(2).indices, 2.0), torch.zeros(2, 1, dtype=torch.float64))


# --- the cache in the loop ------------------------------------------------------------------------------------------


def plain_choices(scores, top_k, capacity, bonus):
    """One sequence, [T][E], with an ordered dictionary as its cache."""
    held, chosen = OrderedDict(), []
    for token in scores:
        favoured = [score + bonus * (expert in held) for expert, score in enumerate(token)]
        own = sorted(range(len(token)), key=lambda expert: -favoured[expert])[:top_k]
        for expert in sorted(own):
            held.pop(expert, None)
            held[expert] = True
        while len(held) > capacity:
            held.popitem(last=False)
        chosen.append(own)
    return chosen


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 1), (1, 3), (2, 2), (2, 4), (3, 6), (2, 6)])
def test_choices_with_a_cache_are_those_of_a_plain_loop(top_k, capacity):
    scores, bonus = draw(5, 30, 6), torch.tensor([0.0, 0.5, 1.0, 3.0, 100.0])
    found = choose_with_cache(scores, top_k, SimulatedCache(capacity, bonus))
    for sequence in range(5):
        expected = plain_choices(scores[sequence].tolist(), top_k, capacity, bonus[sequence].item())
        assert found[sequence].tolist() == expected
    assert torch.equal(found[0], scores[0].topk(top_k).indices)
    used = [len(set(own.flatten().tolist())) for own in found]
    assert used[0] == 6 or capacity < 6
    assert used[4] == top_k  # so large a bonus leaves the first token's experts in place


def test_choices_with_a_cache_do_not_depend_on_later_tokens_nor_on_other_sequences():
    scores = draw(3, 20, 6)
    changed = scores.clone()
    changed[0, 12:] = draw(8, 6, seed=1)
    changed[1] = draw(20, 6, seed=2)
    cache = SimulatedCache(3, torch.tensor([1.0, 1.0, 1.0]))
    one, other = choose_with_cache(scores, 2, cache), choose_with_cache(changed, 2, cache)
    assert torch.equal(one[0, :12], other[0, :12])
    assert torch.equal(one[2], other[2])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(choose_with_cache(scores[2:], 2, SimulatedCache(3, torch.ones(1)))[0], one[2])


def make_prior(**knobs) -> DWRObjective:
    config = make_model(vocab_size=VOCAB, dropout=0.0).config
    return DWRObjective(config, 0.01, cache_prior=4.0, cache_prior_experts=3, **{"seed": 7, **knobs})


def test_the_bonus_of_a_window_is_a_function_of_seed_step_and_window_alone():
    objective = make_prior()
    drawn = objective.simulated_cache(make_batch([0, 1, 2, 5]), 3).bonus.tolist()
    assert drawn[1:3] == objective.simulated_cache(make_batch([1, 2]), 3).bonus.tolist()
    assert len({*drawn}) == 4
    for other in (
        objective.simulated_cache(make_batch([1]), 4),
        make_prior(seed=8).simulated_cache(make_batch([1]), 3),
    ):
        assert other.bonus.item() != drawn[1]
    many = torch.cat([objective.simulated_cache(make_batch([0]), step).bonus for step in range(200)])
    assert 0 < many.min() < 0.5 < 3.5 < many.max() < 4


def test_training_with_a_cache_weighs_its_choices_by_unbiased_probabilities_and_validation_has_no_cache():
    objective, model, batch = make_prior(), make_model(vocab_size=VOCAB, dropout=0.0), make_batch([4, 5, 6, 7])
    simulated = objective.simulated_cache(batch, 2)
    exact, favoured = model(batch.tokens), model(batch.tokens, simulated=simulated)
    first = favoured.router[0]  # whose input does not depend on what is chosen
    assert torch.equal(first.chosen, choose_with_cache(exact.router[0].scores, 2, simulated))
    assert torch.equal(first.probability, exact.router[0].probability)
    assert not torch.equal(first.chosen, exact.router[0].chosen)
    x, moe = draw(4, 6, 32).float(), model.layers[0].moe
    y, own = moe(x, simulated)
    weights = own.probability.gather(2, own.chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    counts = own.chosen.flatten().bincount(minlength=5)
    torch.testing.assert_close(
        y.view(-1, 32), moe.dispatch(x.view(-1, 32), weights.view(-1, 2), own.chosen.view(-1, 2), counts)
    )

    loss, _ = objective.loss(model, batch, 2)
    balance = sum(layer.balance_loss for layer in favoured.router)
    torch.testing.assert_close(loss, nll(favoured.logits, batch.targets) + 0.01 * balance)
    assert objective.validation_sums(model, batch, 2)["nll"] == nll(exact.logits, batch.targets, "none").double().sum()


# --- cache-aware inference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["auxiliary", "loss_free"])
def test_cache_aware_inference_token_by_token_does_what_training_simulates(tmp_path, balance):
    model, tokens = make_model(num_layers=2, balance=balance), torch.randint(64, (1, 24))
    for layer in model.layers:
        if balance == "loss_free":
            layer.moe.selection_bias.copy_(torch.tensor([0.5, -1.0, 0.0, 1.0, -0.5]))
    store = export(tmp_path / "store", model)
    cached = load_backbone(store)
    with torch.inference_mode(), ExpertCache(store, 6, per_layer=True, cache_aware=2.0) as cache:
        bind_experts(cached, cache)
        logits = torch.cat(list(read_text(cached, tokens, 1)), 1)
        simulated = model(tokens, simulated=SimulatedCache(3, torch.tensor([2.0])))
        chosen = torch.stack([layer.chosen[0] for layer in simulated.router], 1)  # [T, L, K]
        torch.testing.assert_close(logits, simulated.logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, model(tokens).logits, atol=1e-2)
    residency = Residency(6, LRU(), 2, 2, per_layer=True)
    replay(Trace("run", chosen.numpy().astype("uint16"), None), residency)
    assert residency.statistics.hits == cache.statistics.hits > 40


def test_what_cache_aware_routing_changed_is_told_in_divergence_and_perplexity():
    generator = torch.Generator().manual_seed(0)
    exact, found = (2 * torch.randn(3, 7, generator=generator) for _ in range(2))
    calls, texts = [([5, 1], found[0]), ([2], found[1]), ([0], found[2])], []

    def forward(tokens):
        texts.append(tokens)
        return exact[len(texts) - 1]

    compared = compare_routing(calls, [2, 0, 6], forward)
    assert texts == [[5, 1], [2], [0]]
    divergence, nlls = 0.0, []
    for ours, theirs, token in zip(found.tolist(), exact.tolist(), [2, 0, 6], strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (theirs, ours))
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
        nlls.append((-math.log(q[token]), -math.log(p[token])))
    expected = [math.exp(sum(column) / 3) for column in zip(*nlls, strict=True)]
    assert compared == pytest.approx((3, divergence, *expected), rel=1e-5)
