"""A model run from its store: the same bits as the trained one, resident or at any capacity of the cache."""

import itertools
import random

import pytest
import torch
from small_store import export, make_model, mapped_files

from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.inference import (
    bind_experts,
    greedy_decode,
    load_backbone,
    load_resident,
    read_text,
    routers,
    sample,
    start_text,
)
from dynaroute.dwr.model import DWRTransformer

SHAPES = {
    "small": {},
    "wide": {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_experts": 4},
    "narrow experts": {"d_model": 48, "d_ff": 16, "top_k": 1},
    "all experts": {"num_layers": 1, "num_experts": 3, "top_k": 3},
    "with a capacity": {"capacity_factor": 0.7},
}


def load_cached(cache: ExpertCache) -> DWRTransformer:
    model = load_backbone(cache.store)
    bind_experts(model, cache)
    return model


def prompts(model, batch=3, time=9):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(model.config.vocab_size, (batch, time), generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reassembled_model_is_the_trained_one(tmp_path, shape):
    model = make_model(**SHAPES[shape])
    resident = load_resident(export(tmp_path / "store", model))
    trained, found = model.state_dict(), resident.state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    with torch.inference_mode():
        assert torch.equal(resident(prompts(model)).logits, model(prompts(model)).logits)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_logits_are_the_trained_models_to_the_bit_at_every_capacity(tmp_path, shape, batch):
    model = make_model(**SHAPES[shape])
    store = export(tmp_path / "store", model)
    tokens = prompts(model, batch)
    expected = list(greedy_decode(model, tokens, 8))  # prefill, then decode steps
    cached = load_backbone(store)
    for capacity in range(1, store.num_experts + 1):
        cache = ExpertCache(store, capacity)
        bind_experts(cached, cache)
        found = list(greedy_decode(cached, tokens, 8))
        assert all(map(torch.equal, found, expected))
        assert cache.statistics.misses >= store.config.num_layers * store.config.top_k
        assert (cache.statistics.hits > 0) or capacity < store.num_experts


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("prefetch", ["none", "frequency", "transition", "gate"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "weighted_lru", "pinned", "next_use"])
def test_no_policy_prefetcher_or_precision_changes_a_logit(tmp_path, policy, prefetch, precision):
    store = export(tmp_path / "store", precision=precision)
    tokens, resident, cached = prompts(make_model(), batch=1), load_resident(store), load_backbone(store)
    expected = list(greedy_decode(resident, tokens, 8))
    for capacity, per_layer in ((1, False), (2, True), (4, False), (5, True), (10, False)):
        prefetcher = make_prefetcher(prefetch, store, routers(cached), 3)
        with ExpertCache(store, capacity, make_policy(policy, store.usage.load), per_layer, prefetcher) as cache:
            bind_experts(cached, cache)
            assert all(map(torch.equal, greedy_decode(cached, tokens, 8), expected))


@pytest.mark.parametrize(("top_k", "batch", "capacity"), [(2, 4, 4), (3, 1, 5), (3, 1, 7), (4, 1, 8)])
@pytest.mark.parametrize("policy", ["lfu", "weighted_lru", "pinned"])
@pytest.mark.parametrize("prefetch", ["frequency", "gate"])
def test_calls_of_many_experts_go_with_prefetching(tmp_path, top_k, batch, capacity, policy, prefetch):
    """A read that waits for an expert still in use must not be in the way of a prefetch of what it evicts."""
    model = make_model(num_layers=3, num_experts=8, top_k=top_k)
    draw = random.Random(1)
    load = [[draw.random() for _ in range(8)] for _ in range(3)]  # uneven, so that policies have favourites
    transitions = [[[draw.randint(1, 9) for _ in range(8)] for _ in range(8)] for _ in range(2)]
    export_store(model, "run", Usage(load=load, transitions=transitions), tmp_path / "store")
    store = ExpertStore(tmp_path / "store")
    tokens, cached = prompts(model, batch), load_backbone(store)
    expected = list(greedy_decode(load_resident(store), tokens, 12))
    prefetcher = make_prefetcher(prefetch, store, routers(cached), top_k)
    with ExpertCache(store, capacity, make_policy(policy, load), False, prefetcher) as cache:
        bind_experts(cached, cache)
        assert all(map(torch.equal, greedy_decode(cached, tokens, 12), expected))


def test_a_cached_model_holds_its_backbone_and_no_experts(tmp_path):
    model = make_model()
    store = export(tmp_path / "store", model)
    cached = load_cached(ExpertCache(store, 3))
    expected = {name for name, _ in model.named_parameters() if ".experts." not in name}
    assert {name for name, _ in cached.named_parameters()} == expected
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in cached.parameters())
    assert not cached.training
    assert mapped_files(store.path) == set()
    list(greedy_decode(cached, prompts(model), 4))
    assert len(mapped_files(store.path)) == 3


def test_a_resident_model_maps_nothing_and_is_aligned(tmp_path):
    store = export(tmp_path / "store")
    resident = load_resident(store)
    assert not resident.training
    assert all(parameter.data_ptr() % 64 == 0 for parameter in resident.parameters())
    assert not any(parameter.requires_grad for parameter in resident.parameters())
    assert mapped_files(store.path) == set()


def test_greedy_decoding_follows_the_most_probable_tokens(tmp_path):
    model = make_model()
    tokens = prompts(model, batch=2, time=4)
    passes = list(greedy_decode(model, tokens, 6))
    assert [tuple(logits.shape) for logits in passes] == [(2, 4, 64), *[(2, 1, 64)] * 6]
    for logits in passes[:-1]:
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    with torch.inference_mode():
        whole = model(tokens).logits
    torch.testing.assert_close(torch.cat(passes, dim=1), whole)
    assert len({tuple(row.tolist()) for row in tokens}) == 2  # the prompts lead to different texts


def test_a_text_is_read_as_it_stands():
    model = make_model()
    text = prompts(model, batch=2, time=10)
    passes = list(read_text(model, text, 4))
    assert [tuple(logits.shape) for logits in passes] == [(2, 4, 64), *[(2, 1, 64)] * 6]
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(passes, dim=1), model(text).logits)


def test_decoding_uses_all_positions_and_no_more(tmp_path):
    model = make_model()
    tokens = prompts(model, batch=1, time=model.config.max_seq_len - 2)
    assert len(list(greedy_decode(model, tokens, 2))) == 3
    with pytest.raises(ValueError, match="24 positions"):
        list(greedy_decode(model, tokens, 3))


def drawn(model, temperature, top_p, seed, count=12, allowed=None):
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.arange(model.config.vocab_size) if allowed is None else allowed
    forward, positions = start_text(model), model.config.max_seq_len
    return list(itertools.islice(sample(forward, positions, [5, 9, 2], temperature, top_p, generator, allowed), count))


def test_greedy_sampling_is_greedy_decoding():
    model = make_model()
    expected = [int(logits[0, -1].argmax()) for logits in greedy_decode(model, torch.tensor([[5, 9, 2]]), 11)]
    assert drawn(model, 0.0, 1.0, 0) == expected
    assert drawn(model, 1.0, 1e-9, 3) == expected  # a nucleus of one token


def test_tokens_are_drawn_by_their_probability_within_the_nucleus():
    model = make_model()
    logits = next(greedy_decode(model, torch.tensor([[5, 9, 2]]), 0))[0, -1] / 2.0
    probability, order = logits.softmax(-1).sort(descending=True)
    nucleus = int((probability.cumsum(0) < 0.6).sum()) + 1
    counts = torch.zeros(model.config.vocab_size)
    for seed in range(600):
        counts[drawn(model, 2.0, 0.6, seed, 1)] += 1
    assert 1 < nucleus < 40
    assert counts[order[nucleus:]].sum() == 0
    expected = probability[:nucleus] / probability[:nucleus].sum()
    assert (counts[order[:nucleus]] / 600 - expected).abs().max() < 4 * (0.25 / 600) ** 0.5
