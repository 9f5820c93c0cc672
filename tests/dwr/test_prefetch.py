"""Predictions of the next layer's experts: what they say, and that their accuracy is counted rightly."""

import pytest
import torch
from small_store import export, make_model, uniform_usage

from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.prefetch import (
    FrequencyPrefetcher,
    GatePrefetcher,
    Prediction,
    TransitionPrefetcher,
    make_prefetcher,
)
from dynaroute.dwr.experts.store import ExpertStore, export_store
from dynaroute.dwr.inference import bind_experts, greedy_decode, load_backbone, routers

NOTHING = torch.empty(0)


def test_frequency_predicts_the_most_used_of_the_next_layer():
    prefetcher = FrequencyPrefetcher([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], 1, 2)
    assert prefetcher.predict(0, NOTHING, NOTHING) == (1, [2, 1], pytest.approx([2 / 3, 1 / 3]))
    assert prefetcher.predict(1, NOTHING, NOTHING) is None


def test_transitions_are_weighed_by_what_the_tokens_chose():
    #                                    to 0  1  2
    prefetcher = TransitionPrefetcher([[[0, 9, 1], [50, 0, 50], [0, 1, 0]]], top_k=1, m=1)
    scores = torch.eye(3)  # three tokens, an expert each
    assert [prefetcher.predict(0, NOTHING, token[None]).experts for token in scores] == [[1], [0], [1]]
    assert prefetcher.predict(0, NOTHING, scores).experts == [1]  # 0.9 + 1.0 against 0.5 and 0.6
    assert prefetcher.predict(1, NOTHING, scores) is None


def test_lookahead_asks_the_next_layers_router():
    model = make_model(num_layers=3)
    state = torch.randn(1, model.config.d_model)
    expected = routers(model)[2](state)[0].topk(2).indices.tolist()
    assert GatePrefetcher(routers(model), 2, 2).predict(1, state, NOTHING)[:2] == (2, expected)
    assert GatePrefetcher(routers(model), 2, 2).predict(2, state, NOTHING) is None


@pytest.fixture
def model():
    return make_model(num_layers=3)


def decode(store: ExpertStore, prefetcher, backbone) -> ExpertCache:
    with ExpertCache(store, 8, prefetcher=prefetcher, selective=False) as cache:
        bind_experts(backbone, cache)
        list(greedy_decode(backbone, torch.tensor([[3]]), 15))
    return cache


def test_without_staleness_every_prediction_is_right(tmp_path, model):
    store = export(tmp_path / "store", model)
    backbone = load_backbone(store)

    class Oracle:
        def predict(self, layer, state, scores):
            return Prediction(layer, scores.topk(model.config.top_k).indices.flatten().tolist(), [1.0] * 2)

    found = decode(store, Oracle(), backbone).statistics
    assert found.accuracy == 1.0
    assert found.predicted == 16 * 3 * 2  # tokens, layers, top_k
    assert found.prefetched == 0  # what is needed now is no prefetch


def test_accuracy_is_the_share_of_what_was_needed(tmp_path, model):
    usage = uniform_usage(model)
    usage = usage.model_copy(update={"load": [[0, 0, 0, 0.4, 0.6]] * 3})
    export_store(model, "run", usage, tmp_path / "store")
    store = ExpertStore(tmp_path / "store")
    backbone, chosen = load_backbone(store), []
    for layer in backbone.layers[1:]:
        layer.moe.router.register_forward_hook(lambda _, __, scores: chosen.append(scores.topk(2).indices))
    found = decode(store, make_prefetcher("frequency", store, routers(backbone), 2), backbone).statistics
    right = sum(int((experts >= 3).sum()) for experts in chosen)
    assert (found.predicted, found.predicted_right) == (16 * 2 * 2, right)
    assert 0 < right < 16 * 2 * 2
