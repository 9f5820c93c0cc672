"""The experts of a model in a bounded amount of memory, read from a store when they are needed, or before.

`residency.py` decides which experts to hold and to evict, from the calls alone; this module carries that out. Threads
read experts while the caller computes with others: of the same call, or, for a prefetch, of the layer before.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dynaroute.dwr.experts.checkpoint import CheckpointStore
from dynaroute.dwr.experts.payoff import Payoff
from dynaroute.dwr.experts.policies import LRU, Key, Policy
from dynaroute.dwr.experts.precision import dequantize
from dynaroute.dwr.experts.prefetch import Prediction, Prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics, Load, Residency
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.dwr.experts.usage import UsageCounter
from dynaroute.dwr.model import ExpertWeights
from dynaroute.errors import DynarouteError


class _Slot:
    """The place of one expert. Any thread that holds the lock may fill it.

    Only the caller's thread assigns it to an expert; a thread that comes to fill it for another one does nothing.
    """

    def __init__(self, memory: ExpertWeights | None) -> None:
        self.memory = memory  # for dequantized weights, or on a GPU; None: they stay in the mapped file
        self.lock = threading.Lock()
        self.key: Key | None = None  # the expert it is assigned to
        self.content: tuple[Key, ExpertWeights] | None = None  # the expert in it, replaced in one step
        self.read_ahead = False  # whether the prefetching thread filled it, and it was not used yet
        self.released: torch.cuda.Event | None = None  # on a GPU: when the last computation with it ends

    def holds(self, key: Key) -> bool:
        """Whether the weights of that expert are in it."""
        return self.content is not None and self.content[0] == key


class ExpertCache:
    """At most `capacity` experts in memory. For one caller at a time.

    Never evicts an expert that the current call still needs. A prefetch, which may be wasted, evicts none of the
    current call's experts, used or not, and none prefetched for a layer that was not called yet; if there is no other,
    it is dropped. It may evict experts of earlier calls, in the policy's order: a full cache would otherwise have no
    room for prefetches. `prefetch_evictions` counts these. Which predictions are followed depends on measured times, so
    hits and misses do too; logits do not.

    On a CPU, 32-bit floats are used in place, in the mapped file. Lower precision is dequantized, and weights for a GPU
    copied, into memory that is reused.

    It is a context manager: leaving it ends its threads, which otherwise end with the last reference to it.

    Attributes:
        store: where experts are read from.
        device: where they are put: cpu or cuda.
        counter: of what the tokens use, or None.
        cache_aware: added to the router's scores of experts that are held when a layer is called, in logits. Routing is
            exact with 0, the default, and inexact otherwise: then outputs depend on what the cache holds.
    """

    def __init__(
        self,
        store: ExpertStore | CheckpointStore,
        capacity: int,
        policy: Policy | None = None,
        per_layer: bool = False,
        prefetcher: Prefetcher | None = None,
        device: str = "cpu",
        counter: UsageCounter | None = None,
        cache_aware: float = 0.0,
        selective: bool = True,
    ) -> None:
        """An empty cache; the default policy is `LRU`, and without a prefetcher nothing is prefetched.

        Unless it is selective, every prediction is followed, not only those that are worth it (`payoff.py`).

        Raises:
            DynarouteError: there is no room for one expert, or with budgets per layer for one of each layer.
        """
        self.store, self.device, self.cache_aware = store, device, cache_aware
        config = store.config
        self._residency = Residency(capacity, policy or LRU(), config.num_layers, config.top_k, per_layer)
        self._slots: dict[Key, _Slot] = {}
        self._empty: list[_Slot] = []  # of experts that could not be read, or were forgotten
        self._prefetcher, self.counter = prefetcher, counter
        self._payoff = Payoff(config.top_k) if prefetcher and selective else None
        self._ended: tuple[int, float] | None = None  # the last call of a single token: its layer, and when it ended
        self._spent = 0.0  # seconds of making the last prediction
        self._begun: float | None = None  # when the prefetching thread began the read that is under way
        self._predictions: dict[int, Prediction] = {}  # by layer, until it is called
        self._ahead: set[Key] = set()  # prefetched for these layers
        self._failure: Exception | None = None  # of a prefetch
        self._counting = threading.Lock()  # for counts of more than one thread
        # Two pools: requested experts never queue behind predicted ones. Threads start when they are needed.
        self._readers = ThreadPoolExecutor(1, "expert-reader")
        self._prefetchers = ThreadPoolExecutor(1, "expert-prefetcher")
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._staging = threading.local()  # pinned memory of each thread, for copies to a GPU

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and releases the experts. Reads that have begun are finished, and no others begin."""
        for pool in (self._prefetchers, self._readers):
            pool.shutdown(cancel_futures=True)
        self._slots.clear()
        self._empty.clear()
        self._failure = None

    def clear(self) -> None:
        """Forgets all experts, so that a call that ended anywhere, as by Ctrl-C, leaves nothing half done."""
        self._residency.clear()
        for slot in self._slots.values():
            slot.key = None  # threads that come to fill it do nothing
        self._empty += self._slots.values()
        self._slots.clear()
        self._predictions.clear()
        self._ahead, self._failure, self._ended = set(), None, None

    def __len__(self) -> int:
        """The number of experts held."""
        return len(self._residency)

    def __contains__(self, key: Key) -> bool:
        """Whether the expert (layer, expert) is held."""
        return key in self._residency

    @property
    def statistics(self) -> CacheStatistics:
        """Counts since the last `take_statistics`."""
        return self._residency.statistics

    def take_statistics(self) -> CacheStatistics:
        """The statistics so far; counts restart from zero."""
        with self._counting:
            taken, self._residency.statistics = self._residency.statistics, CacheStatistics()
        return taken

    def preference(self, layer: int) -> Tensor | None:
        """What is added to a layer's scores, float32 [E]; None if routing is exact."""
        if not self.cache_aware:
            return None
        held = [(layer, expert) in self._residency for expert in range(self.store.config.num_experts)]
        return self.cache_aware * torch.tensor(held, dtype=torch.float32, device=self.device)

    @contextmanager
    def exact_routing(self) -> Iterator[None]:
        """Meanwhile no expert is preferred, and nothing is counted for a profile."""
        kept = self.cache_aware, self.counter
        self.cache_aware, self.counter = 0.0, None
        try:
            yield
        finally:
            self.cache_aware, self.counter = kept

    def observe(self, layer: int, state: Tensor, scores: Tensor) -> None:
        """Shows the prefetcher a layer's input [S, D], and what it chooses experts by, [S, E], before its `fetch`."""
        if self.counter:
            self.counter.count(layer, scores.topk(self.store.config.top_k).indices)
        if self._prefetcher is None or (self._payoff and not self._payoff.wants_prediction(layer)):
            return
        started = time.perf_counter()
        if prediction := self._prefetcher.predict(layer, state, scores):
            self._predictions[prediction.layer] = prediction
        self._spent = time.perf_counter() - started

    def fetch(self, layer: int, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yields each needed expert of a layer once; its weights are valid until the next one is requested.

        Experts in the cache come first, so that none of them is evicted before it was used. The missing ones are read
        meanwhile, as soon as there is room.

        Raises:
            DynarouteError: an expert's file cannot be read, also one that was only prefetched.
        """
        if self._failure:
            try:
                raise self._failure
            finally:
                self._failure = None  # its traceback holds the caller's weights, and would hold itself by this cache
        # Neither learns from calls of several tokens, as of a prompt, nor predicts for them: they take other times.
        payoff = self._payoff if len(needed) <= self.store.config.top_k else None
        if payoff and self._ended and self._ended[0] == layer - 1:
            payoff.dense.add(time.perf_counter() - self._ended[1])
        self._ended = None
        self._compare_prediction(layer, needed)
        hits, loads = self._residency.call(layer, needed)
        self.statistics.late += sum(not self._slots[key].holds(key) for key in hits)
        if payoff:
            payoff.called(layer, needed, len(loads), [load.victim for load in loads])
        unused = dict.fromkeys([*hits, *(load.key for load in loads)])  # in the order of their use
        waiting = list(loads)
        try:
            self._start(waiting, unused)
            if payoff or not self._payoff:
                self._prefetch(unused)
            for key in list(unused):
                weights, started = self._weights(key), time.perf_counter()
                yield key[1], weights
                del weights
                if payoff:
                    payoff.expert.add(time.perf_counter() - started)
                del unused[key]
                self._start(waiting, unused)
            if payoff:
                self._ended = layer, time.perf_counter()
        finally:
            for load in waiting:  # the caller stopped early
                self._residency.drop(load.key)
                if slot := self._slots.pop(load.victim, None):
                    self._empty.append(slot)

    def _compare_prediction(self, layer: int, needed: list[int]) -> None:
        predicted = self._predictions.pop(layer, None)
        if predicted is not None and len(needed) <= self.store.config.top_k:  # a single token
            self.statistics.predicted += len(needed)
            self.statistics.predicted_right += len(set(needed) & set(predicted.experts))
        self._ahead = {key for key in self._ahead if key[0] != layer}

    def _start(self, waiting: list[Load], unused: dict[Key, None]) -> None:
        """Begins to read missing experts, except those that wait for an expert still to be used.

        It does not stop at the first that has to wait: only experts of the current layer, which no prefetch reads, keep
        their slots.
        """
        for load in [load for load in waiting if load.victim not in unused]:
            waiting.remove(load)
            slot = self._assign(load)
            if load.key != next(iter(unused)):  # the next one is read by this thread, which would only wait for it
                self._readers.submit(self._fill, slot, load.key)

    def _prefetch(self, unused: dict[Key, None]) -> None:
        """Begins to read predicted experts, if they are worth it."""
        is_worth, started = self._payoff and self._payoff.is_worth, time.perf_counter()
        for prediction in self._predictions.values():
            if self._payoff:
                begun, slots = self._begun, [(key, self._slots.get(key)) for key in unused]
                reads = sum(slot is None or not slot.holds(key) for key, slot in slots)  # None: it waits for a slot
                busy = max(0.0, begun + self._payoff.read.value - time.perf_counter()) if begun else 0.0
                self._payoff.plan(prediction, len(unused) - reads, reads, busy)
            for load in self._residency.prefetch(prediction.layer, prediction.experts, list(unused), is_worth):
                self._ahead.add(load.key)
                self._prefetchers.submit(self._fill_ahead, self._assign(load), load.key)
        if self._payoff and self._predictions:
            self._payoff.predicting.add(self._spent + time.perf_counter() - started)

    def _assign(self, load: Load) -> _Slot:
        """Gives an expert the slot of the one it evicts."""
        if load.victim:
            slot = self._slots.pop(load.victim)
            self._ahead.discard(load.victim)
        else:
            slot = self._empty.pop() if self._empty else self._new_slot()
        if self._stream:
            slot.released = torch.cuda.current_stream().record_event()
        slot.key = load.key
        slot.content = None  # unmaps the evicted expert before another is mapped
        self._slots[load.key] = slot
        return slot

    def _new_slot(self) -> _Slot:
        in_place = self.store.in_place and self.device == "cpu"
        return _Slot(None if in_place else self.store.new_weights(self.device))

    def _weights(self, key: Key) -> ExpertWeights:
        """An expert's weights, read by this thread unless another has begun to."""
        slot, started = self._slots[key], time.perf_counter()
        try:
            self._fill(slot, key)
        except DynarouteError:
            self._residency.drop(key)
            self._empty.append(self._slots.pop(key))
            raise
        self.statistics.wait_seconds += time.perf_counter() - started
        self.statistics.used_ahead += slot.read_ahead
        slot.read_ahead = False
        return slot.content[1]

    def _fill_ahead(self, slot: _Slot, key: Key) -> None:
        """Runs on the prefetching thread; the next `fetch` raises its error."""
        if key in self._ahead:  # otherwise the layer was called first, and `fetch` reads the expert
            self._begun = time.perf_counter()
            try:
                self._fill(slot, key, ahead=True)
            except Exception as error:
                self._failure = error
            finally:
                self._begun = None

    def _fill(self, slot: _Slot, key: Key, ahead: bool = False) -> None:
        """Reads an expert into its slot, on any thread, unless it is there or the slot now belongs to another."""
        with slot.lock:
            if slot.key != key or slot.holds(key):
                return
            slot.content = None  # one that was still being read when the slot was assigned: a slot maps one file
            started = time.perf_counter()
            with self._counting:
                self.statistics.reads += 1
                self.statistics.reads_ahead += ahead
            if self._stream:
                self._copy_to_gpu(self.store.map(*key), slot)
                weights = slot.memory
            else:
                weights = self.store.load(*key, slot.memory)
            slot.read_ahead = ahead
            slot.content = key, weights
            if self._payoff:
                with self._counting:
                    self._payoff.read.add(time.perf_counter() - started)

    @torch.inference_mode()  # as pinned memory may have been allocated in that mode
    def _copy_to_gpu(self, file: Tensor, slot: _Slot) -> None:
        """Copies on a stream of its own, while the GPU computes; returns when it is done."""
        if not file.is_pinned():
            if not hasattr(self._staging, "memory"):
                self._staging.memory = torch.empty_like(file, pin_memory=True)
            file = self._staging.memory.copy_(file)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.released)
            dequantize(self.store.views(file), slot.memory)
            self._stream.record_event().synchronize()  # the weights are copied, and the pinned memory is free


@dataclass(frozen=True)
class CachedExperts:
    """The experts of one layer as an `ExpertSource`, from the cache that all layers share."""

    cache: ExpertCache
    layer: int

    def observe(self, state: Tensor, scores: Tensor) -> None:
        """See `ExpertCache.observe`."""
        self.cache.observe(self.layer, state, scores)

    def preference(self) -> Tensor | None:
        """See `ExpertCache.preference`."""
        return self.cache.preference(self.layer)

    def fetch(self, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """See `ExpertCache.fetch`."""
        return self.cache.fetch(self.layer, needed)
