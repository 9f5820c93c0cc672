"""Policies and the bookkeeping around them: against plain references, and against the optimum by exhaustive search."""

import functools
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaroute.dwr.experts.policies import (
    LFRU,
    LFU,
    LRU,
    Belady,
    LeastStale,
    NextUse,
    Pinned,
    TokenPath,
    WeightedLRU,
    make_policy,
)
from dynaroute.dwr.experts.residency import CacheStatistics, Residency
from dynaroute.errors import DynarouteError

LAYERS, EXPERTS, TOP_K = 3, 4, 2
LOAD = [[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]]
ONLINE = ("lru", "lfu", "weighted_lru", "pinned", "next_use", "least_stale", "lfru", "token_path")
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def calls(layers=LAYERS, experts=EXPERTS, max_size=25):
    needed = st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True)
    return st.lists(st.tuples(st.integers(0, layers - 1), needed), max_size=max_size)


def make(capacity, policy=None, per_layer=False, layers=LAYERS):
    return Residency(capacity, policy or LRU(), layers, TOP_K, per_layer)


def replay(residency, trace) -> CacheStatistics:
    for layer, needed in trace:
        residency.call(layer, needed)
    return residency.statistics


@PROPERTY
@given(
    trace=calls(),
    capacity=st.integers(1, LAYERS * EXPERTS + 1),
    name=st.sampled_from([*ONLINE, "min"]),
    per_layer=st.booleans(),
    ahead=st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True),
)
def test_no_policy_exceeds_its_budget_and_requests_are_hits_or_misses(trace, capacity, name, per_layer, ahead):
    capacity = max(capacity, LAYERS) if per_layer else capacity
    residency = make(capacity, Belady(trace) if name == "min" else make_policy(name, LOAD), per_layer)
    held = set()
    for layer, needed in trace:
        hits, loads = residency.call(layer, needed)
        assert set(hits) == {(layer, expert) for expert in needed} & held
        assert sorted(load.key for load in loads) == sorted({(layer, expert) for expert in needed} - held)
        loads += residency.prefetch((layer + 1) % LAYERS, ahead, [(layer, expert) for expert in needed])
        for key, victim in loads:
            assert key not in held
            held.add(key)
            if victim:
                held.remove(victim)
            assert len(held) <= capacity
            if per_layer:
                budgets = [capacity // LAYERS + (index < capacity % LAYERS) for index in range(LAYERS)]
                assert all(sum(key[0] == index for key in held) <= budgets[index] for index in range(LAYERS))
        assert all(key in residency for key in held)
        assert len(residency) == len(held)
    found = residency.statistics
    assert found.hits + found.misses == found.requests == sum(len(needed) for _, needed in trace)
    assert found.misses + found.prefetched - found.evictions == len(held)
    assert found.useful <= found.prefetched


@PROPERTY
@given(trace=calls(), capacity=st.integers(1, LAYERS * EXPERTS), per_layer=st.booleans())
def test_min_is_never_beaten(trace, capacity, per_layer):
    capacity = max(capacity, LAYERS) if per_layer else capacity
    best = replay(make(capacity, Belady(trace), per_layer), trace).hits
    assert all(replay(make(capacity, make_policy(name, LOAD), per_layer), trace).hits <= best for name in ONLINE)


def fewest_misses(trace, capacity):
    """By trying everything: what is held after a call is any part of what was held and needed that has room."""

    @functools.cache
    def misses_from(time, held):
        if time == len(trace):
            return 0
        layer, needed = trace[time]
        keys = frozenset((layer, expert) for expert in needed)
        missing = keys - held
        after = [
            frozenset(kept)
            for size in range(min(capacity, len(held | keys)) + 1)
            for kept in itertools.combinations(held | keys, size)
        ]
        return len(missing) + min(misses_from(time + 1, kept) for kept in after)

    return misses_from(0, frozenset())


@settings(PROPERTY, max_examples=60)
@given(trace=calls(layers=2, experts=3, max_size=6), capacity=st.integers(1, 4))
def test_min_is_the_optimum(trace, capacity):
    assert replay(make(capacity, Belady(trace), layers=2), trace).misses == fewest_misses(trace, capacity)


def test_min_refuses_another_trace():
    residency = make(2, Belady([(0, [1, 2])]))
    with pytest.raises(ValueError, match="call 0"):
        residency.call(0, [1, 3])


@PROPERTY
@given(trace=calls(), capacity=st.integers(TOP_K, LAYERS * EXPERTS))
def test_lru_is_a_list_in_the_order_of_use(trace, capacity):
    trace = [(layer, needed[:TOP_K]) for layer, needed in trace]
    residency, held, misses = make(capacity), [], 0
    for layer, needed in trace:
        residency.call(layer, needed)
        keys = [(layer, expert) for expert in needed]
        missing = [key for key in keys if key not in held]
        misses += len(missing)
        # As of one use, in the order in which they were asked for.
        kept = [key for key in held if key not in keys]
        held = (kept[max(0, len(held) + len(missing) - capacity) :] if missing else kept) + keys
        assert all(key in residency for key in held)
    assert residency.statistics.misses == misses


def test_lfu_ranks_by_uses_then_by_recency():
    policy = LFU()
    for needed in ([0, 1], [0], [2], [2]):
        policy.record(1, needed)
    assert sorted([(1, e) for e in range(4)], key=policy.rank) == [(1, 3), (1, 1), (1, 0), (1, 2)]


def test_pinned_experts_stay():
    residency = make(3, Pinned(LOAD))
    replay(residency, [(2, [0]), (0, [0]), *[(layer, [1, 3]) for layer in (0, 1, 2)] * 3])
    assert (2, 0) in residency
    assert (0, 0) in residency


def test_weighted_lru_is_the_sum_of_decayed_uses():
    policy = WeightedLRU(LAYERS, EXPERTS)
    uses = [[0, 1], [0], [2], [0, 2], [3]]
    for needed in uses:
        policy.record(0, needed)
        policy.record(1, [0])  # another layer's time
    keep = 0.5 ** (1 / policy.half_life)
    for expert in range(EXPERTS):
        ages = [age for age, needed in enumerate(reversed(uses)) if expert in needed]
        assert policy.rank((0, expert)) == pytest.approx((1 - keep) * sum(keep**age for age in ages))


def test_next_use_is_the_mean_discount_of_the_time_to_the_next_use():
    generator = random.Random(1)
    tokens = [[generator.sample(range(EXPERTS), 2) for _ in range(LAYERS)] for _ in range(9)]
    policy, weighted = NextUse(LAYERS, EXPERTS), WeightedLRU(LAYERS, EXPERTS)
    for token in tokens[:-1]:
        for layer, needed in enumerate(token):
            policy.record(layer, needed)
            weighted.record(layer, needed)
    policy.record(0, tokens[-1][0])
    weighted.record(0, tokens[-1][0])
    ranks = []
    for layer, distance in ((1, 1 / 3), (2, 2 / 3), (0, 1)):  # layer 1 comes next, after a third of a token
        used = [token[layer] for token in tokens[: 9 if layer == 0 else 8]]
        after = [then for expert in used[-1] for now, then in itertools.pairwise(used) if expert in now]
        for expert in range(EXPERTS):
            recent = weighted.rank((layer, expert))
            following = (recent + sum(expert in then for then in after)) / (1 + len(after))
            p = (recent + following) / 2
            series = sum(p * (1 - p) ** k * policy.discount ** (distance + k) for k in range(200))
            assert policy.rank((layer, expert)) == pytest.approx(series)
            ranks.append(series)
    assert len(set(ranks)) > EXPERTS


def test_least_stale_ranks_by_calls_of_the_experts_layer_then_by_the_distance_of_the_layer():
    policy = LeastStale(LAYERS)
    for layer, needed in ((0, [0, 1]), (1, [0]), (2, [0]), (0, [1]), (1, [2])):
        policy.record(layer, needed)
    keys = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0)]  # stale are 0 of layer 0 and 0 of layer 1, which runs last
    assert sorted(keys, key=policy.rank) == [(1, 0), (0, 0), (1, 2), (0, 1), (2, 0)]


def test_lfru_ranks_by_uses_over_the_age_of_the_last():
    policy = LFRU(1)
    for needed in ([0, 1], [0], [0], [2], [3]):
        policy.record(0, needed)
    assert [policy.rank((0, expert)) for expert in range(4)] == [3 / 3, 1 / 5, 1 / 2, 1]


def test_token_path_learns_which_expert_follows_which_of_the_layer_before():
    policy, generator = TokenPath(2, 6), random.Random(0)
    for _ in range(80):  # layer 1 uses what layer 0 has used, plus one
        expert = generator.randrange(6)
        policy.record(0, [expert])
        policy.record(1, [(expert + 1) % 6])
    for expert in range(6):
        policy.record(0, [expert])
        assert max(range(6), key=lambda other: policy.rank((1, other))) == (expert + 1) % 6
        policy.record(1, [(expert + 1) % 6])


def test_a_long_prompt_passes_through_the_share_of_its_layer():
    residency = make(6, layers=3)  # two for each layer
    for layer in range(3):
        residency.call(layer, [0, 1])
    residency.call(1, [0, 1, 2, 3])
    assert all((layer, expert) in residency for layer in (0, 2) for expert in (0, 1))
    assert sum((1, expert) in residency for expert in range(4)) == 2


def test_of_a_long_prompt_the_experts_asked_for_last_stay():
    residency = make(6, layers=3)
    for layer in range(3):
        residency.call(layer, [3, 1, 0, 2])
    assert all((layer, expert) in residency for layer in range(3) for expert in (0, 2))


def test_a_prefetch_takes_the_place_of_nothing_that_is_needed_or_expected():
    residency = make(3)
    residency.call(0, [0, 1])
    assert [load.victim for load in residency.prefetch(1, [2, 3], [(0, 0), (0, 1)])] == [None]  # there is no more room
    assert residency.prefetch(2, [0], [(0, 0), (0, 1)]) == []
    assert residency.call(1, [2])[0] == [(1, 2)]
    assert [load.victim for load in residency.prefetch(2, [0, 1, 2], [(1, 2)])] == [(0, 0), (0, 1)]
    found = residency.statistics
    assert (found.prefetched, found.useful, found.prefetch_evictions, found.evictions) == (3, 1, 2, 2)


def test_a_demand_goes_before_an_expectation():
    residency = make(2)
    residency.prefetch(1, [0, 1], [])
    _, loads = residency.call(0, [2])
    assert loads[0].victim in {(1, 0), (1, 1)}


@pytest.mark.parametrize(("capacity", "per_layer"), [(0, False), (-1, False), (2, True)])
def test_a_cache_without_room_is_refused(capacity, per_layer):
    with pytest.raises(DynarouteError, match=f"capacity = {capacity}: an expert cache must hold at least 1 expert"):
        make(capacity, per_layer=per_layer)


def test_statistics_add_up():
    one = CacheStatistics(requests=3, hits=1, misses=2, prefetched=1)
    assert one.hit_rate == 1 / 3
    assert one + one == CacheStatistics(requests=6, hits=2, misses=4, prefetched=2)
    assert one == CacheStatistics(requests=3, hits=1, misses=2, prefetched=1, reads=3, late=1, wait_seconds=2.0)
