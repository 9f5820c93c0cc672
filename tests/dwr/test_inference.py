"""A model run from its store: the same bits as the trained one, resident or at any capacity of the cache."""

import pytest
import torch
from small_store import export, make_model, mapped_files

from dynaroute.dwr.experts import ExpertCache
from dynaroute.dwr.inference import bind_experts, greedy_decode, load_cached, load_resident

SHAPES = {
    "small": {},
    "wide": {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_experts": 4},
    "narrow experts": {"d_model": 48, "d_ff": 16, "top_k": 1},
    "all experts": {"num_layers": 1, "num_experts": 3, "top_k": 3},
    "with dropped tokens": {"capacity_factor": 0.7},
}


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
    cached = load_cached(ExpertCache(store, 1))
    for capacity in range(1, store.num_experts + 1):
        cache = ExpertCache(store, capacity)
        bind_experts(cached, cache)
        found = list(greedy_decode(cached, tokens, 8))
        assert all(map(torch.equal, found, expected))
        assert cache.statistics.misses >= store.config.num_layers * store.config.top_k
        assert (cache.statistics.hits > 0) or capacity < store.num_experts


def test_a_warm_start_changes_no_logit(tmp_path):
    model = make_model()
    store = export(tmp_path / "store", model)
    cache = ExpertCache(store, 4)
    cache.warm_start(store.expert_load)
    found = greedy_decode(load_cached(cache), prompts(model), 5)
    assert all(map(torch.equal, found, greedy_decode(model, prompts(model), 5)))


def test_one_changed_weight_in_the_store_changes_logits(tmp_path):
    model = make_model()
    store = export(tmp_path / "store", model)
    tokens = prompts(model)
    with torch.inference_mode():
        before = load_cached(ExpertCache(store, 2))(tokens).logits
        for path in store.path.glob("expert_layer1_*"):
            content = bytearray(path.read_bytes())
            content[-1] ^= 0x80  # the sign of the last bias
            path.write_bytes(content)
        assert not torch.equal(load_cached(ExpertCache(store, 2))(tokens).logits, before)


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


def test_decoding_uses_all_positions_and_no_more(tmp_path):
    model = make_model()
    tokens = prompts(model, batch=1, time=model.config.max_seq_len - 2)
    assert len(list(greedy_decode(model, tokens, 2))) == 3
    with pytest.raises(ValueError, match="24 positions"):
        list(greedy_decode(model, tokens, 3))
