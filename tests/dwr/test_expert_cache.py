"""The expert cache against a plain simulation of least recent use, and what it keeps mapped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import export, make_model, mapped_files

from dynaroute.dwr.experts import CachedExperts, CacheStatistics, ExpertCache
from dynaroute.dwr.experts.store import expert_file
from dynaroute.errors import DynarouteError

LAYERS, EXPERTS = 2, 5


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def store(tmp_path_factory, model):
    return export(tmp_path_factory.mktemp("cache") / "store", model)


def fetched(cache, layer, needed):
    """The experts in the order in which they came."""
    return [expert for expert, _ in cache.fetch(layer, needed)]


class PlainLRU:
    """A list, least recently used first; within a call, what is there comes first."""

    def __init__(self, capacity):
        self.capacity, self.held = capacity, []
        self.hits = self.misses = self.evictions = 0

    def fetch(self, layer, needed):
        before = set(self.held)
        for expert in sorted(needed, key=lambda expert: (layer, expert) not in before):
            key = (layer, expert)
            if key in self.held:
                self.hits += 1
                self.held.remove(key)
            else:
                self.misses += 1
                if len(self.held) == self.capacity:
                    self.held.pop(0)
                    self.evictions += 1
            self.held.append(key)


CALLS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True).map(sorted),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(calls=CALLS, capacity=st.integers(1, LAYERS * EXPERTS + 2))
def test_any_sequence_of_requests_is_that_of_a_plain_lru(store, model, calls, capacity):
    cache, plain = ExpertCache(store, capacity), PlainLRU(capacity)
    resident = [dict(layer.moe.experts.fetch(list(range(EXPERTS)))) for layer in model.layers]
    for layer, needed in calls:
        came = []
        for expert, weights in cache.fetch(layer, needed):
            came.append(expert)
            assert len(cache) <= capacity
            assert all(map(torch.equal, weights, resident[layer][expert]))
        assert sorted(came) == needed
        plain.fetch(layer, needed)
        assert list(cache._experts) == plain.held
    found = cache.statistics
    assert (found.hits, found.misses, found.evictions) == (plain.hits, plain.misses, plain.evictions)
    assert found.hits + found.misses == found.requests == sum(len(needed) for _, needed in calls)
    assert found.bytes_read == found.misses * store.expert_bytes


def test_experts_in_the_cache_come_first_and_none_of_them_is_evicted_before_its_use(store):
    cache = ExpertCache(store, 2)
    fetched(cache, 0, [3, 4])
    cache.take_statistics()
    assert fetched(cache, 0, [0, 1, 3, 4]) == [3, 4, 0, 1]
    assert cache.statistics == CacheStatistics(4, 2, 2, 2, 2 * store.expert_bytes)


def test_layers_share_the_capacity_and_do_not_mix_their_experts(store):
    cache = ExpertCache(store, 3)
    fetched(cache, 0, [1, 2])
    fetched(cache, 1, [1])
    assert {key for key in [(0, 1), (0, 2), (1, 1), (1, 2)] if key in cache} == {(0, 1), (0, 2), (1, 1)}
    fetched(cache, 1, [2])
    assert (0, 1) not in cache


def test_a_cache_for_one_expert_maps_at_most_the_one_in_use_and_the_next(store):
    cache = ExpertCache(store, 1)
    for expert, weights in cache.fetch(0, [0, 1, 2]):
        assert mapped_files(store.path) == {expert_file(0, expert)}
        assert weights.w1.isfinite().all()
    del weights
    assert mapped_files(store.path) == {expert_file(0, 2)}


def test_an_evicted_expert_is_unmapped_when_its_last_user_lets_go(store):
    cache = ExpertCache(store, 1)
    ((_, weights),) = cache.fetch(0, [0])
    before = weights.w1.clone()
    fetched(cache, 0, [1])
    assert mapped_files(store.path) == {expert_file(0, 0), expert_file(0, 1)}
    assert torch.equal(weights.w1, before)
    del weights
    assert mapped_files(store.path) == {expert_file(0, 1)}
    del cache
    assert mapped_files(store.path) == set()


def test_a_warm_start_holds_the_most_frequent_experts_and_evicts_the_least_frequent_first(store):
    cache = ExpertCache(store, 3)
    cache.warm_start([[0.1, 0.2, 0.05, 0.6, 0.05], [0.5, 0.1, 0.1, 0.1, 0.2]])
    held = [(0, 3), (1, 0), (0, 1)]
    assert all(key in cache for key in held)
    assert cache.take_statistics() == CacheStatistics(bytes_read=3 * store.expert_bytes)
    for kept in (held[:2], held[:1], []):
        fetched(cache, 1, [next(expert for expert in (1, 2, 3) if (1, expert) not in cache)])
        assert [key for key in held if key in cache] == kept


def test_a_warm_start_reads_only_what_is_not_there(store):
    cache = ExpertCache(store, 2)
    fetched(cache, 0, [3, 4])
    cache.take_statistics()
    cache.warm_start([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0]])
    assert cache.statistics == CacheStatistics(evictions=1, bytes_read=store.expert_bytes)
    assert (0, 3) in cache
    assert (1, 0) in cache


def test_a_capacity_in_bytes_is_that_of_whole_experts(store):
    assert ExpertCache.of_bytes(store, 3 * store.expert_bytes).capacity == 3
    assert ExpertCache.of_bytes(store, 4 * store.expert_bytes - 1).capacity == 3
    with pytest.raises(DynarouteError, match="one expert"):
        ExpertCache.of_bytes(store, store.expert_bytes - 1)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_cache_without_room_for_an_expert_is_refused(store, capacity):
    with pytest.raises(DynarouteError, match=f"capacity = {capacity}"):
        ExpertCache(store, capacity)


def test_statistics_start_again_when_taken(store):
    cache = ExpertCache(store, 4)
    fetched(cache, 0, [0, 1])
    fetched(cache, 0, [0])
    taken = cache.take_statistics()
    assert taken == CacheStatistics(3, 1, 2, 0, 2 * store.expert_bytes)
    assert taken.hit_rate == 1 / 3
    assert cache.statistics == CacheStatistics()
    assert taken + taken == CacheStatistics(6, 2, 4, 0, 4 * store.expert_bytes)


def test_an_expert_that_cannot_be_read_is_named_and_the_cache_goes_on(tmp_path):
    store = export(tmp_path / "store")
    (store.path / expert_file(0, 1)).rename(tmp_path / "away")
    cache = ExpertCache(store, 2)
    experts = CachedExperts(cache, 0)
    with pytest.raises(DynarouteError, match=expert_file(0, 1).replace(".", r"\.")):
        list(experts.fetch([0, 1, 2]))
    assert (0, 1) not in cache
    (tmp_path / "away").rename(store.path / expert_file(0, 1))
    assert [expert for expert, _ in experts.fetch([0, 1, 2])] == [0, 1, 2]
    assert len(cache) == 2
