"""The experts of a model in a bounded amount of memory, read from a store when they are needed, or before.

What is held and what makes way is decided in `residency.py`, by the calls alone; here decisions are carried out. Reader
threads bring experts while the caller computes with another: of the same call, or, for a prefetch, of the layer before.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dynaroute.dwr.experts.policies import LRU, Key, Policy
from dynaroute.dwr.experts.precision import decode
from dynaroute.dwr.experts.prefetch import Prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics, Load, Residency
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.dwr.model import ExpertWeights
from dynaroute.errors import DynarouteError


class _Slot:
    """The place of one expert, which any thread may fill that holds the lock.

    Only the caller's thread says for which expert it is; one that comes to fill it for another does nothing.
    """

    def __init__(self, memory: ExpertWeights | None) -> None:
        self.memory = memory  # of its own, where weights are decoded or on a GPU; else they stay in the mapped file
        self.lock = threading.Lock()
        self.key: Key | None = None  # whose it is
        self.content: tuple[Key, ExpertWeights] | None = None  # what is in it, set at once
        self.read_ahead = False  # whether the prefetching thread put it there, and it was not used yet
        self.released: torch.cuda.Event | None = None  # on a GPU: when the last computation with it is over

    def holds(self, key: Key) -> bool:
        """Whether the weights of that expert are there."""
        return self.content is not None and self.content[0] == key


class ExpertCache:
    """At most `capacity` experts in memory. For one caller at a time.

    Nothing makes way that the current call still needs. For a prefetch, which may be in vain, none of what the current
    call needs makes way at all, used or not, nor what another prefetch brought for a layer that is still to come; if
    nothing else is held, it is given up. What earlier calls needed may make way, in the policy's order: were it kept, a
    full cache would have no room for any prefetch. `prefetch_evictions` counts these.

    On a CPU, 32-bit floats are used where they are, in the mapped file. Lower precision is decoded, and what a GPU
    needs copied, into memory that later experts use again.

    It is a context manager: leaving it ends its threads, which otherwise end with the last reference to it.

    Attributes:
        store: where experts are read from.
        device: where they are put: cpu or cuda.
    """

    def __init__(
        self,
        store: ExpertStore,
        capacity: int,
        policy: Policy | None = None,
        per_layer: bool = False,
        prefetcher: Prefetcher | None = None,
        device: str = "cpu",
    ) -> None:
        """An empty cache; `LRU` where no policy is given, and nothing read ahead where no prefetcher is.

        Raises:
            DynarouteError: there is no room for one expert, or with budgets per layer for one of each layer.
        """
        self.store, self.device = store, device
        config = store.config
        self._residency = Residency(capacity, policy or LRU(), config.num_layers, config.top_k, per_layer)
        self._slots: dict[Key, _Slot] = {}
        self._empty: list[_Slot] = []  # of experts that could not be read
        self._prefetcher = prefetcher
        self._predictions: dict[int, list[int]] = {}  # of layers that are still to come
        self._ahead: set[Key] = set()  # prefetched for them
        self._failure: Exception | None = None  # of a prefetch
        self._counting = threading.Lock()  # for what more than one thread counts
        # Two pools: what is asked for never queues behind what is only expected. Threads start when they are needed.
        self._readers = ThreadPoolExecutor(1, "expert-reader")
        self._prefetchers = ThreadPoolExecutor(1, "expert-prefetcher")
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._staging = threading.local()  # pinned memory of each thread, for copies to a GPU

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and lets go of the experts. What is being read is read to its end, nothing else is begun."""
        for pool in (self._prefetchers, self._readers):
            pool.shutdown(cancel_futures=True)
        self._slots.clear()

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
        """The statistics so far; counting starts again from zero."""
        with self._counting:
            taken, self._residency.statistics = self._residency.statistics, CacheStatistics()
        return taken

    def foresee(self, layer: int, state: Tensor, scores: Tensor) -> None:
        """Takes what a layer's router was given [S, D] and what it said [S, E], just before that layer's `fetch`."""
        if self._prefetcher and (prediction := self._prefetcher.predict(layer, state, scores)):
            self._predictions[prediction.layer] = prediction.experts

    def fetch(self, layer: int, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yields each needed expert of a layer once; its weights are valid until the next one is asked for.

        Those in the cache come first: none of them makes way before it was used, however many are missing. The missing
        are read meanwhile, as soon as there is room.

        Raises:
            DynarouteError: an expert's file cannot be read, be it one that was only prefetched.
        """
        if self._failure:
            raise self._failure
        self._compare_prediction(layer, needed)
        hits, loads = self._residency.call(layer, needed)
        self.statistics.late += sum(not self._slots[key].holds(key) for key in hits)
        unused = dict.fromkeys([*hits, *(load.key for load in loads)])  # in the order of their use
        waiting = list(loads)
        try:
            self._start(waiting, unused)
            self._prefetch(unused)
            for key in list(unused):
                yield key[1], self._weights(key)
                del unused[key]
                self._start(waiting, unused)
        finally:
            for load in waiting:  # the caller went away
                self._residency.drop(load.key)
                if slot := self._slots.pop(load.victim, None):
                    self._empty.append(slot)

    def _compare_prediction(self, layer: int, needed: list[int]) -> None:
        foretold = self._predictions.pop(layer, None)
        if foretold is not None and len(needed) <= self.store.config.top_k:  # as one token needs
            self.statistics.foretold += len(needed)
            self.statistics.foretold_right += len(set(needed) & set(foretold))
        self._ahead = {key for key in self._ahead if key[0] != layer}

    def _start(self, waiting: list[Load], unused: dict[Key, None]) -> None:
        """Begins to read what is missing, unless what has to make way is still to be used.

        All of it, not up to the first that has to wait: a slot is only kept by experts of the layer at hand, which no
        prefetch asks for.
        """
        for load in [load for load in waiting if load.victim not in unused]:
            waiting.remove(load)
            slot = self._assign(load)
            if load.key != next(iter(unused)):  # which this thread reads itself: it could only wait
                self._readers.submit(self._fill, slot, load.key)

    def _prefetch(self, unused: dict[Key, None]) -> None:
        """Begins to read what is foretold."""
        for layer, experts in self._predictions.items():
            for load in self._residency.prefetch(layer, experts, list(unused)):
                self._ahead.add(load.key)
                self._prefetchers.submit(self._fill_ahead, self._assign(load), load.key)

    def _assign(self, load: Load) -> _Slot:
        """Gives an expert the slot of the one that makes way."""
        if load.victim:
            slot = self._slots.pop(load.victim)
            self._ahead.discard(load.victim)
        else:
            slot = self._empty.pop() if self._empty else self._new_slot()
        if self._stream:
            slot.released = torch.cuda.current_stream().record_event()
        slot.key = load.key
        slot.content = None  # unmaps what makes way, before anything is mapped in its place
        self._slots[load.key] = slot
        return slot

    def _new_slot(self) -> _Slot:
        in_place = self.store.precision == "fp32" and self.device == "cpu"
        return _Slot(None if in_place else self.store.new_weights(self.device))

    def _weights(self, key: Key) -> ExpertWeights:
        """An expert's weights, which this thread reads if no other has begun to."""
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
        """Runs on the prefetching thread, and leaves its error to the next `fetch`."""
        if key in self._ahead:  # or the layer has come before its turn, and is served by `fetch`
            try:
                self._fill(slot, key, ahead=True)
            except Exception as error:
                self._failure = error

    def _fill(self, slot: _Slot, key: Key, ahead: bool = False) -> None:
        """Reads an expert into its slot, on any thread, unless it is there, or the slot is another's by now."""
        with slot.lock:
            if slot.key != key:
                return
            if slot.holds(key) and (slot.memory or not self.store.is_modified(*key)):
                return
            with self._counting:
                self.statistics.reads += 1
                self.statistics.reads_ahead += ahead
            file = self.store.map(*key)
            if self._stream:
                self._copy_to_gpu(file, slot)
            elif slot.memory:
                decode(self.store.views(file), slot.memory)
            slot.read_ahead = ahead
            slot.content = key, slot.memory or ExpertWeights(**self.store.views(file))

    @torch.inference_mode()  # whichever mode the caller is in, pinned memory that was made in another is written to
    def _copy_to_gpu(self, file: Tensor, slot: _Slot) -> None:
        """Copies on a stream of its own, while the GPU computes; returns when it is done."""
        if not file.is_pinned():
            if not hasattr(self._staging, "memory"):
                self._staging.memory = torch.empty_like(file, pin_memory=True)
            file = self._staging.memory.copy_(file)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.released)
            decode(self.store.views(file), slot.memory)
            self._stream.record_event().synchronize()  # the weights are there, and the pinned memory is free


@dataclass(frozen=True)
class CachedExperts:
    """The experts of one layer as an `ExpertSource`, through the cache that all layers share."""

    cache: ExpertCache
    layer: int

    def foresee(self, state: Tensor, scores: Tensor) -> None:
        """See `ExpertCache.foresee`."""
        self.cache.foresee(self.layer, state, scores)

    def fetch(self, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """See `ExpertCache.fetch`."""
        return self.cache.fetch(self.layer, needed)
