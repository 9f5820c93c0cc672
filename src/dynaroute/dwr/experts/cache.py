"""A bounded number of experts at hand, the least recently used making way: what a model runs from a store with."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

from dynaroute.dwr.experts.store import PAGE, ExpertStore
from dynaroute.dwr.model import ExpertWeights
from dynaroute.errors import DynarouteError


@dataclass
class CacheStatistics:
    """What a cache did. A request is one expert that one forward pass of a layer needs, for any number of tokens."""

    requests: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0  # weights mapped from the store, by misses and by warm starts

    @property
    def hit_rate(self) -> float:
        """The share of requests that were hits; NaN without requests."""
        return self.hits / self.requests if self.requests else float("nan")

    def __add__(self, other: Self) -> Self:
        """Both together."""
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class ExpertCache:
    """The experts of all layers, at most `capacity` of them mapped at a time, evicted by least recent use.

    An evicted expert is unmapped as soon as nobody uses its weights. A model uses one at a time and lets go of it when
    it has been handed the next, whose pages are touched only then: even with a capacity of one, no more than `capacity`
    experts are ever resident. One `fetch` at a time: not for several threads.

    Attributes:
        statistics: counts since the last `take_statistics`.
    """

    def __init__(self, store: ExpertStore, capacity: int) -> None:
        """An empty cache for `capacity` experts.

        Raises:
            DynarouteError: there is no room for one expert.
        """
        if capacity < 1:
            raise DynarouteError(f"capacity = {capacity}: an expert cache must hold at least 1 expert")
        self.store, self.capacity = store, capacity
        self.statistics = CacheStatistics()
        self._experts: OrderedDict[tuple[int, int], ExpertWeights] = OrderedDict()  # least recently used first

    @classmethod
    def of_bytes(cls, store: ExpertStore, capacity: int) -> Self:
        """A cache for as many whole experts as `capacity` bytes hold.

        Raises:
            DynarouteError: they do not hold one.
        """
        if capacity < store.expert_bytes:
            raise DynarouteError(f"capacity = {capacity} bytes: one expert of {store.path} has {store.expert_bytes}")
        return cls(store, capacity // store.expert_bytes)

    def fetch(self, layer: int, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yields each needed expert of a layer once; its weights are valid until the next one is asked for.

        Those in the cache come first: none of them is evicted before it was used, however many are missing.

        Raises:
            DynarouteError: an expert's file cannot be read.
        """
        hits = [expert for expert in needed if (layer, expert) in self._experts]
        misses = [expert for expert in needed if (layer, expert) not in self._experts]
        for expert in hits:
            self.statistics.requests += 1
            self.statistics.hits += 1
            self._experts.move_to_end((layer, expert))
            yield expert, self._experts[layer, expert]
        for expert in misses:
            self.statistics.requests += 1
            self.statistics.misses += 1
            self._read(layer, expert)
            yield expert, self._experts[layer, expert]

    def warm_start(self, frequencies: list[list[float]]) -> None:
        """Fills the cache with the experts of the highest frequency [L][E], the most frequent to stay the longest.

        Reads them from disk now rather than at their first use. No requests are counted.
        """
        keys = [(layer, expert) for layer, row in enumerate(frequencies) for expert in range(len(row))]
        keys.sort(key=lambda key: frequencies[key[0]][key[1]], reverse=True)  # stable: ties by layer, then expert
        chosen = keys[: self.capacity]
        for key in chosen:
            if key in self._experts:
                self._experts.move_to_end(key)  # out of the way of evictions
        for key in chosen:
            if key not in self._experts:
                self._read(*key)
                for tensor in self._experts[key]:
                    tensor.view(-1)[:: PAGE // tensor.element_size()].sum()  # touches every page
        for key in reversed(chosen):
            self._experts.move_to_end(key)

    def take_statistics(self) -> CacheStatistics:
        """The statistics so far; counting starts again from zero."""
        taken, self.statistics = self.statistics, CacheStatistics()
        return taken

    def __len__(self) -> int:
        """The number of experts in the cache."""
        return len(self._experts)

    def __contains__(self, key: tuple[int, int]) -> bool:
        """Whether the expert (layer, expert) is in the cache."""
        return key in self._experts

    def _read(self, layer: int, expert: int) -> None:
        """Maps an expert that is not in the cache, after making room for it."""
        while len(self._experts) >= self.capacity:
            self._experts.popitem(last=False)
            self.statistics.evictions += 1
        self._experts[layer, expert] = self.store.read(layer, expert)
        self.statistics.bytes_read += self.store.expert_bytes


@dataclass(frozen=True)
class CachedExperts:
    """The experts of one layer as an `ExpertSource`, through the cache that all layers share."""

    cache: ExpertCache
    layer: int

    def fetch(self, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """See `ExpertCache.fetch`."""
        return self.cache.fetch(self.layer, needed)
