"""The simulator: it hits like the cache that it stands for, and its clock is that of a plain calculation."""

from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from small_store import make_model
from torch import nn

from dynaroute.analysis.replay import Seconds, predict, ratio_to_resident, replay
from dynaroute.analysis.traces import Trace, count_transitions, load_trace, record_routing, save_trace, uniform_trace
from dynaroute.config.dwr import PolicyName, SimulatedMachine, SimulatedModel
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.policies import LRU, make_policy
from dynaroute.dwr.experts.prefetch import FrequencyPrefetcher, GatePrefetcher, make_prefetcher
from dynaroute.dwr.experts.residency import Residency
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.inference import bind_experts, load_backbone, routers
from dynaroute.dwr.model import KVCache
from dynaroute.errors import DynarouteError


class Text:
    """Windows [2, 16] of tokens, as `record_routing` reads them."""

    seq_len = 16
    tokens = torch.arange(32).view(2, 16) * 7 % 64

    def __len__(self):
        return 2

    def batch(self, indices):
        return self.tokens[list(indices)], self.tokens[list(indices)]


@pytest.fixture(scope="module")
def model():
    return make_model(num_layers=3)


@pytest.fixture(scope="module")
def trace(model) -> Trace:
    return record_routing(model, Text(), "run")


@pytest.mark.parametrize("prefetch", ["none", "frequency", "transition", "gate"])
@pytest.mark.parametrize(
    ("layers", "policy", "capacity", "per_layer"),
    [(3, "lru", 5, False), (3, "next_use", 7, True), (1, "lru", 3, False)],  # a single layer has no next one to predict
)
def test_a_replay_does_what_the_cache_does(tmp_path, layers, policy, capacity, per_layer, prefetch):
    model = make_model(num_layers=layers)
    trace = record_routing(model, Text(), "run")
    generator = torch.Generator().manual_seed(4)
    load = torch.rand(layers, 5, generator=generator, dtype=torch.float64).tolist()  # no two alike: ties may go any way
    transitions = torch.randint(1, 1000, (layers - 1, 5, 5), generator=generator).tolist()
    export_store(model, "run", Usage(load=load, transitions=transitions), tmp_path / "store")
    store = ExpertStore(tmp_path / "store")
    residency = Residency(capacity, make_policy(policy, store.usage.load), layers, 2, per_layer)
    recorded = make_prefetcher(prefetch, store, [nn.Identity()] * layers, 2)
    replay(trace, residency, recorded and predict(recorded, trace))

    backbone = load_backbone(store)
    prefetcher = make_prefetcher(prefetch, store, routers(backbone), 2)
    with ExpertCache(
        store, capacity, make_policy(policy, store.usage.load), per_layer, prefetcher, selective=False
    ) as cache:
        bind_experts(backbone, cache)
        for window in Text.tokens:
            keys = KVCache(model.config, 1, like=model.norm.weight)
            with torch.inference_mode():
                for token in window:
                    backbone(token.view(1, 1), keys)
        assert cache.statistics == residency.statistics


def test_a_trace_holds_what_routers_chose(model, trace):
    with torch.inference_mode():
        statistics = model(Text.tokens).router
    for layer in range(3):
        assert torch.equal(torch.tensor(trace.experts[:, layer].astype(int)), statistics[layer].chosen.flatten(0, 1))
    assert trace.lookahead.shape == (32, 2, 5)
    assert trace.lookahead.dtype == np.float32


def test_a_uniform_trace_is_as_long_and_every_choice_is_alike_whatever_was_chosen_before():
    trace = Trace("run", np.zeros((9000, 2, 2), np.uint16), np.zeros((9000, 1, 4), np.float32))
    uniform = uniform_trace(trace)
    for own, other, again in zip(uniform[1:], trace[1:], uniform_trace(trace)[1:], strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        assert (own == again).all()
    choices = uniform.experts[:, :, 0] * 4 + uniform.experts[:, :, 1]
    for before, after in (choices.T, (choices[:-1, 0], choices[1:, 0])):  # of the layer before; of the token before
        found, counts = np.unique(before * 16 + after, return_counts=True)
        assert len(found) == (4 * 3) ** 2  # no expert twice
        assert scipy.stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_no_online_policy_hits_more_of_uniform_routing_than_the_share_held_and_lru_less(policy):
    trace = uniform_trace(Trace("run", np.zeros((1500, 4, 2), np.uint16), np.zeros((1500, 3, 8), np.uint16)))
    rates = {}
    for capacity in (4, 11, 16):
        residency = Residency(capacity, make_policy(policy, [[1 / 8] * 8] * 4), 4, 2)
        replay(trace, residency)
        rates[capacity] = residency.statistics.hit_rate
        assert rates[capacity] < capacity / 32 + 0.012  # three standard errors
    if policy == "lru":  # layers take turns, so what it evicts is what comes next
        assert rates[4] == 0
        assert rates[11] < 11 / 32 - 0.05
    if policy == "next_use":
        assert rates == pytest.approx({capacity: capacity / 32 for capacity in rates}, abs=0.012)


def test_transitions_are_counted_by_token(trace):
    counts = count_transitions(trace.experts, 5)
    for layer in range(2):
        for i in range(5):
            for j in range(5):
                both = [i in token[layer] and j in token[layer + 1] for token in trace.experts.tolist()]
                assert counts[layer][i][j] == sum(both)


def test_a_trace_comes_back_as_it_was_saved(tmp_path, trace):
    save_trace(trace, tmp_path / "trace")
    loaded = load_trace(tmp_path / "trace")
    assert loaded.run == "run"
    assert (loaded.experts == trace.experts).all()
    assert (loaded.lookahead == trace.lookahead).all()
    (tmp_path / "trace/experts.npy").write_bytes(b"junk")
    with pytest.raises(DynarouteError, match=r"experts\.npy: missing or damaged"):
        load_trace(tmp_path / "trace")


def test_times_are_bytes_over_bandwidths():
    machine = SimulatedMachine(read_gb_per_second=2.0, read_latency_us=100.0, compute_gb_per_second=8.0)
    found = Seconds.of(machine, SimulatedModel(expert_mib=8.0, dense_mib=16.0))
    expected = (100e-6 + 8 * 2**20 / 2e9, 8 * 2**20 / 8e9, 16 * 2**20 / 8e9)
    assert found == pytest.approx(expected)


def seconds_tick_by_tick(calls, read, expert, dense):
    """One second after another: the channel continues its read, or begins the next; the model waits or computes."""
    clock, there, demanded, expected = 0, set(), [], []
    reading = None  # (expert, seconds left)

    def tick():
        nonlocal clock, reading
        clock += 1
        if reading is None and (queue := demanded or expected):
            reading = queue.pop(0), read
        if reading is not None:
            key, left = reading
            reading = (key, left - 1) if left > 1 else None
            if reading is None:
                there.add(key)

    for call in calls:
        for _ in range(dense):
            tick()
        expected.clear()
        there.difference_update(call.missing, call.ahead)
        demanded += [key for key in call.used if key not in there and not (reading and reading[0] == key)]
        expected += call.ahead
        for key in call.used:
            while key not in there:
                tick()
            for _ in range(expert):
                tick()
    return clock


FREQUENCY = FrequencyPrefetcher([[0.1, 0.3, 0.2, 0.25, 0.15]] * 3, 2, 2)
GATE = GatePrefetcher([nn.Identity()] * 3, 2, 2)


@pytest.mark.parametrize("prefetcher", [None, FREQUENCY, GATE], ids=["none", "frequency", "gate"])
@pytest.mark.parametrize(("read", "expert", "dense"), [(10, 1, 3), (4, 2, 1), (3, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("capacity", [1, 6, 11])
def test_the_clock_is_that_of_a_plain_loop(trace, capacity, read, expert, dense, prefetcher):
    calls = replay(trace, Residency(capacity, LRU(), 3, 2), prefetcher and predict(prefetcher, trace))
    resident = sum(dense + len(call.used) * expert for call in calls)
    found = ratio_to_resident(calls, Seconds(float(read), float(expert), float(dense)))
    assert found == resident / seconds_tick_by_tick(calls, read, expert, dense)


def test_reads_that_take_no_time_cost_nothing(trace):
    calls = replay(trace, Residency(1, LRU(), 3, 2))
    assert ratio_to_resident(calls, Seconds(read=0.0, expert=1.0, dense=3.0)) == 1.0
