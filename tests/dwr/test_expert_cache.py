"""The expert cache: that it hands out the right weights whatever its threads do, and what it keeps in memory."""

import contextlib
import gc
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import export, make_model, mapped_files

from dynaroute.dwr.experts.cache import CachedExperts, ExpertCache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import Prediction
from dynaroute.dwr.experts.residency import CacheStatistics
from dynaroute.dwr.experts.store import expert_file
from dynaroute.errors import DynarouteError

LAYERS, EXPERTS = 2, 5


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def stores(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("cache")
    return {precision: export(folder / precision, model, precision=precision) for precision in ("fp32", "int8")}


@pytest.fixture
def store(stores):
    return stores["fp32"]


@pytest.fixture
def open_cache():
    """Makes caches whose threads, and the experts that these may still read, are gone when the next test begins."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(ExpertCache(*arguments, **options))


class Says:
    """A prefetcher that predicts given experts, of the layer after the one that asks."""

    def __init__(self, experts):
        self.experts = experts

    def predict(self, layer, state, scores):
        return Prediction(layer + 1, self.experts, [0.5] * len(self.experts)) if layer + 1 < LAYERS else None


def fetched(cache, layer, needed):
    """The experts in the order in which they came."""
    cache.observe(layer, torch.empty(0), torch.empty(0))
    return [expert for expert, _ in cache.fetch(layer, needed)]


CALLS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True),
        st.lists(st.integers(0, EXPERTS - 1), max_size=3, unique=True),
        st.integers(0, EXPERTS),  # experts after which the caller goes away
    ),
    max_size=20,
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    calls=CALLS,
    capacity=st.integers(1, LAYERS * EXPERTS + 2),
    policy=st.sampled_from(["lru", "lfu", "next_use"]),
    precision=st.sampled_from(["fp32", "int8"]),
)
def test_weights_are_the_stores_in_any_sequence_of_calls_and_prefetches(stores, calls, capacity, policy, precision):
    store, prefetcher = stores[precision], Says([])
    with ExpertCache(
        store, capacity, make_policy(policy, store.usage.load), prefetcher=prefetcher, selective=False
    ) as cache:
        for layer, needed, ahead, patience in calls:
            prefetcher.experts = ahead
            cache.observe(layer, torch.empty(0), torch.empty(0))
            came = []
            experts = cache.fetch(layer, needed)
            for expert, weights in experts:
                came.append(expert)
                assert all(map(torch.equal, weights, store.read(layer, expert)))
                assert len(mapped_files(store.path)) <= capacity
                del weights
                if len(came) > patience:
                    experts.close()
            assert sorted(came) == sorted(needed) or len(came) == patience + 1
            assert len(cache) <= capacity
        found = cache.statistics
        assert found.hits + found.misses == found.requests == sum(len(needed) for _, needed, _, _ in calls)


def test_an_evicted_expert_is_unmapped_when_its_last_user_lets_go(store, open_cache):
    cache = open_cache(store, 1)
    ((_, weights),) = cache.fetch(0, [0])
    before = weights.w1.clone()
    fetched(cache, 0, [1])
    assert mapped_files(store.path) == {expert_file(0, 0), expert_file(0, 1)}
    assert torch.equal(weights.w1, before)
    del weights
    assert mapped_files(store.path) == {expert_file(0, 1)}
    cache.close()
    assert mapped_files(store.path) == set()


def test_dequantized_experts_leave_nothing_mapped(stores, open_cache):
    cache = open_cache(stores["int8"], 2)
    fetched(cache, 0, [0, 1, 2])
    assert mapped_files(stores["int8"].path) == set()


# --- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(store, monkeypatch):
    """Lets no expert of layer 1 be read before the test opens it; the names of the threads that asked for one."""
    gate, readers, read = threading.Event(), {}, store.map

    def waiting(layer, expert):
        readers[layer, expert] = threading.current_thread().name
        if layer == 1:
            assert gate.wait(10)
        return read(layer, expert)

    monkeypatch.setattr(store, "map", waiting)
    gate.readers = readers
    yield gate
    gate.set()


def test_a_prefetch_is_read_while_the_layer_before_computes(store, gate):
    with ExpertCache(store, 6, prefetcher=Says([2, 3]), selective=False) as cache:
        assert fetched(cache, 0, [0, 1]) == [0, 1]  # while the read for layer 1 hangs
        gate.set()
        assert fetched(cache, 1, [2]) == [2]
        assert gate.readers[1, 2].startswith("expert-prefetcher")
        found = cache.statistics
        assert (found.prefetched, found.useful, found.misses, found.hits) == (2, 1, 2, 1)
        assert found.used_ahead == 1
        assert (found.predicted, found.predicted_right) == (1, 1)


def test_the_missing_are_read_while_the_caller_computes_with_those_that_are_there(store, gate):
    with ExpertCache(store, 6) as cache:
        gate.set()
        fetched(cache, 1, [0])
        gate.clear()
        experts = cache.fetch(1, [0, 1, 2])
        assert next(experts)[0] == 0  # while the reads of 1 and 2 hang
        gate.set()
        assert sorted(expert for expert, _ in experts) == [1, 2]
        assert gate.readers[1, 1].startswith("expert-reader")


def test_late_hits_are_counted(store, gate):
    with ExpertCache(store, 6, prefetcher=Says([2]), selective=False) as cache:
        fetched(cache, 0, [0])
        threading.Timer(0.05, gate.set).start()
        assert fetched(cache, 1, [2]) == [2]
        assert (cache.statistics.late, cache.statistics.useful) == (1, 1)
        assert cache.statistics.wait_seconds > 0.01


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(calls=CALLS, capacity=st.integers(1, LAYERS * EXPERTS + 2))
def test_reads_are_counted_when_they_take_place(stores, calls, capacity):
    store, prefetcher, readers = stores["fp32"], Says([]), []
    read = store.map

    def counted(layer, expert):
        readers.append(threading.current_thread().name)
        return read(layer, expert)

    with (
        pytest.MonkeyPatch.context() as patch,
        ExpertCache(store, capacity, prefetcher=prefetcher, selective=False) as cache,
    ):
        patch.setattr(store, "map", counted)
        taken = CacheStatistics()
        for layer, needed, ahead, _ in calls:
            prefetcher.experts = ahead
            fetched(cache, layer, needed)
            taken += cache.take_statistics()
        cache.close()
        found = taken + cache.take_statistics()
    assert found.reads == len(readers)
    assert found.reads_ahead == sum(name.startswith("expert-prefetcher") for name in readers)
    assert found.used_ahead <= found.reads_ahead <= found.prefetched
    assert found.misses <= found.reads - found.reads_ahead <= found.misses + found.late


def test_a_prefetch_whose_layer_comes_before_its_turn_is_no_read(store, monkeypatch):
    begun, asked, read = threading.Event(), threading.Event(), store.map

    def waiting(layer, expert):
        if threading.current_thread().name.startswith("expert-prefetcher"):
            begun.set()
            assert asked.wait(10)
        elif layer == 1:
            asked.set()
        return read(layer, expert)

    monkeypatch.setattr(store, "map", waiting)
    with ExpertCache(store, 6, prefetcher=Says([2, 3, 4]), selective=False) as cache:
        fetched(cache, 0, [0])
        assert begun.wait(10)  # of 2, while 3 and 4 wait for their turn
        fetched(cache, 1, [3])
        cache.close()
        found = cache.statistics
    assert (found.prefetched, found.useful, found.misses, found.late) == (3, 1, 1, 1)
    assert (found.reads, found.reads_ahead, found.used_ahead) == (3, 1, 0)  # 0 and 3 on demand, 2 wasted, 4 never


def test_an_expert_whose_place_was_taken_while_it_was_read_is_unmapped_first(store, monkeypatch):
    begun, gate, mapped, read = threading.Event(), threading.Event(), {}, store.map

    def waiting(*key):
        mapped[key] = mapped_files(store.path)
        content = read(*key)
        if key == (1, 2):
            begun.set()
            assert gate.wait(10)
        return content

    monkeypatch.setattr(store, "map", waiting)
    with ExpertCache(store, 2, prefetcher=Says([2]), selective=False) as cache:
        fetched(cache, 0, [0])
        assert begun.wait(10)
        threading.Timer(0.05, gate.set).start()
        fetched(cache, 1, [4])
    assert mapped[1, 4] == {expert_file(0, 0)}


def test_after_an_error_in_the_prefetcher_no_thread_is_left_and_no_file_mapped(tmp_path):
    store = export(tmp_path / "store")
    (store.path / expert_file(1, 2)).unlink()
    before = threading.active_count()

    def fail():
        with ExpertCache(store, 2, prefetcher=Says([2]), selective=False) as cache:
            cache.observe(0, torch.empty(0), torch.empty(0))
            ((_, _held),) = cache.fetch(0, [0])
            cache._prefetchers.shutdown()  # it has been tried by now
            fetched(cache, 1, [3])

    gc.disable()  # nothing waits for it
    try:
        with pytest.raises(DynarouteError, match=expert_file(1, 2)):
            fail()
        assert mapped_files(store.path) == set()
    finally:
        gc.enable()
    assert threading.active_count() == before


def test_threads_end_when_the_caller_fails(store):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), ExpertCache(store, 6, prefetcher=Says([0, 1]), selective=False) as cache:
        for _ in cache.fetch(0, [0, 1, 2, 3]):
            raise ZeroDivisionError
    assert threading.active_count() == before


def test_ctrl_c_ends_a_process_whose_threads_are_reading(tmp_path):
    store = export(tmp_path / "store")
    script = f"""
import signal, os, time, threading
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.store import ExpertStore
store = ExpertStore({str(store.path)!r})
read = store.map
def slow(*key):
    time.sleep(0.2)
    return read(*key)
store.map = slow
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
cache = ExpertCache(store, 6)
while True:
    for layer in (0, 1):
        list(cache.fetch(layer, [0, 1, 2, 3, 4]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


# --- errors --------------------------------------------------------------------------------------------------------


def test_an_expert_that_cannot_be_read_is_named_and_the_cache_stays_usable(tmp_path):
    store = export(tmp_path / "store")
    (store.path / expert_file(0, 1)).rename(tmp_path / "away")
    with ExpertCache(store, 2) as cache:
        experts = CachedExperts(cache, 0)
        with pytest.raises(DynarouteError, match=expert_file(0, 1).replace(".", r"\.")):
            list(experts.fetch([0, 1, 2]))
        assert (0, 1) not in cache
        (tmp_path / "away").rename(store.path / expert_file(0, 1))
        assert sorted(expert for expert, _ in experts.fetch([0, 1, 2])) == [0, 1, 2]
        assert len(cache) == 2
