"""What the benchmark of locality measures, against plain computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_lru import lru_hit_rate
from small_store import make_model
from small_training import SEQ_LEN, VOCAB, Tokens

from dynaroute.analysis.locality import (
    ShuffledText,
    all_hit_rates,
    route_cache_aware,
    shuffled_trace,
    tokens_per_second,
)
from dynaroute.analysis.replay import Seconds
from dynaroute.analysis.traces import Trace, record_routing
from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.dwr.locality import SimulatedCache


class Padded(Tokens):
    """The last window ends early."""

    def batch(self, indices):
        tokens, targets = super().batch(indices)
        for row, index in enumerate(indices):
            if index == len(self) - 1:
                tokens[row, 4:], targets[row, 3:] = 0, IGNORED_TARGET
        return tokens, targets


WINDOWS = Padded(5)


def make_trace(tokens=60, layers=2, experts=6, top_k=2) -> Trace:
    draw = np.random.default_rng(1)
    chosen = [[draw.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)]
    return Trace("run", np.array(chosen, np.uint16), np.zeros((tokens, layers - 1, experts), np.uint16))


def test_lru_with_equal_shares_is_a_plain_cache_of_each_layer():
    trace = make_trace()
    rates = all_hit_rates(trace, 6, 8)
    assert rates["lru"] == lru_hit_rate(trace.experts.tolist(), 8)
    alone = [lru_hit_rate(trace.experts[:, [layer]].tolist(), 4) for layer in range(2)]
    assert rates["lru_per_layer"] == pytest.approx(sum(alone) / 2)
    assert math.isnan(all_hit_rates(trace, 6, 1)["lru_per_layer"])


def test_tokens_per_second_is_one_over_what_reads_and_products_take():
    trace = make_trace()
    for capacity in (8, 12):
        misses = round((1 - lru_hit_rate(trace.experts.tolist(), capacity)) * 240)
        # Reads that take nothing leave the products; dense layers that take nothing leave nothing to hide reads behind.
        found = tokens_per_second(trace, capacity, {"free": Seconds(0.0, 2.0, 3.0), "slow": Seconds(1e6, 0.0, 1.0)})
        assert found["free"] == pytest.approx(1 / (2 * 3 + 4 * 2))
        assert found["slow"] == pytest.approx(60 / (1e6 * misses), rel=1e-3)


def test_shuffled_text_has_the_same_tokens_in_another_order_and_the_same_padding():
    shuffled = ShuffledText(WINDOWS)
    (tokens, targets), (others, same) = WINDOWS.batch([1, 4]), shuffled.batch([1, 4])
    assert torch.equal(targets, same)
    assert not torch.equal(tokens, others)
    assert torch.equal(others[0].sort().values, tokens[0].sort().values)
    assert torch.equal(others[1, :3].sort().values, tokens[1, :3].sort().values)
    assert torch.equal(others[1, 3:], tokens[1, 3:])
    assert torch.equal(shuffled.batch([4])[0][0], others[1])
    assert len(record_routing(make_model(vocab_size=VOCAB), shuffled, "run").experts) == 4 * SEQ_LEN + 3


def test_a_shuffled_trace_uses_each_expert_as_often():
    trace = make_trace()
    shuffled = shuffled_trace(trace)
    assert sorted(trace.experts.tolist()) == sorted(shuffled.experts.tolist())
    assert trace.experts.tolist() != shuffled.experts.tolist()


def test_cache_aware_routing_is_scored_by_loss_and_divergence_and_without_preference_is_exact():
    model = make_model(vocab_size=VOCAB)
    exact = route_cache_aware(model, WINDOWS, 2, 0.0)
    assert (exact.kl, exact.loss) == (0, exact.exact_loss)
    assert np.array_equal(exact.trace.experts, record_routing(model, WINDOWS, "").experts)

    found = route_cache_aware(model, WINDOWS, 2, 3.0)
    tokens, targets = WINDOWS.batch(range(5))
    cache = SimulatedCache(2, torch.full((5,), 3.0))
    with torch.inference_mode():
        logits, aware = (model(tokens, simulated=own).logits.log_softmax(-1) for own in (None, cache))
    divergence = (logits.exp() * (logits - aware)).sum(-1)[targets != IGNORED_TARGET]
    nll = F.nll_loss(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)
    assert found.exact_loss == exact.loss == pytest.approx(nll.item(), rel=1e-5)
    assert found.loss != found.exact_loss
    assert found.kl == pytest.approx(divergence.mean().item(), rel=1e-3)
    hits = [all_hit_rates(one.trace, 5, 4)["lru_per_layer"] for one in (found, exact)]
    assert hits[0] > hits[1]
