"""Which experts are in a cache: its decisions, without weights.

The cache (`cache.py`) carries out these decisions, and the replay of a trace (`analysis.replay`) makes the same ones,
so both have the same hits and misses. Nothing here depends on time: the same calls lead to the same experts, however
long a read takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Self

from dynaroute.dwr.experts.policies import Belady, Key, Policy
from dynaroute.errors import DynarouteError


def nearest_a_third(num_experts: int, capacities: Sequence[int] = ()) -> int:
    """The capacity closest to a third of the experts, of those given or else of all."""
    return min(capacities or range(1, num_experts + 1), key=lambda capacity: abs(capacity - num_experts / 3))


@dataclass
class CacheStatistics:
    """Counts of a cache. A request is one expert that one call needs, for any number of tokens.

    The first counts are of decisions: they are the same on every run and in a replay. The last depend on speed: a
    prefetch is not read if its expert is evicted, or its layer is called, before its turn.
    """

    requests: int = 0
    hits: int = 0  # in the cache when requested, or being prefetched
    misses: int = 0
    evictions: int = 0
    prefetched: int = 0  # experts to be read before they are requested
    useful: int = 0  # of these, requested before they were evicted
    prefetch_evictions: int = 0  # of the evictions, those for a prefetch
    predicted: int = 0  # requests that a prediction was made for
    predicted_right: int = 0  # of these, those that it named
    # Counts that depend on the machine's speed are not compared.
    reads: int = field(default=0, compare=False)  # experts read from the store
    reads_ahead: int = field(default=0, compare=False)  # of these, begun by the prefetching thread
    used_ahead: int = field(default=0, compare=False)  # of these, used before they were evicted; the rest is wasted
    late: int = field(default=0, compare=False)  # hits not read yet: being read, or not begun
    wait_seconds: float = field(default=0.0, compare=False)  # the caller's time waiting for experts

    @property
    def hit_rate(self) -> float:
        """The share of requests that were hits; NaN without requests."""
        return self.hits / self.requests if self.requests else float("nan")

    @property
    def accuracy(self) -> float:
        """The share of requests that a prediction named, of those it was made for; NaN without predictions."""
        return self.predicted_right / self.predicted if self.predicted else float("nan")

    def __add__(self, other: Self) -> Self:
        """The sums of all counts."""
        return type(self)(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


class Load(NamedTuple):
    """An expert to read, and the one to evict for it."""

    key: Key
    victim: Key | None  # None: there is room; the expert itself: it is not kept after use


class Residency:
    """The experts held, at most `capacity`: of all layers together, or in equal shares of the layers.

    A call first uses the experts that are held, so none that it needs is evicted before it was used. Then it reads and
    uses the missing ones, one after another, the most worth keeping last. A call that needs more experts than its
    layer's share (the prefill of a long prompt) streams through that share: the other layers keep their experts.

    Attributes:
        statistics: counts since they were last taken.
    """

    def __init__(self, capacity: int, policy: Policy, num_layers: int, top_k: int, per_layer: bool = False) -> None:
        """Empty at first.

        Raises:
            DynarouteError: there is no room for one expert, or with budgets per layer for one of each layer.
        """
        if capacity < (num_layers if per_layer else 1):
            least = f"at least 1 expert in each of {num_layers} layers" if per_layer else "at least 1 expert"
            raise DynarouteError(f"capacity = {capacity}: an expert cache must hold {least}")
        self.capacity, self.policy = capacity, policy
        self.statistics = CacheStatistics()
        self._per_layer = per_layer
        share, rest = divmod(capacity, num_layers)
        self._budget = [share + (layer < rest) for layer in range(num_layers)]
        self._top_k = top_k
        self._held: dict[Key, None] = {}  # in the order in which they were read
        self._unused: set[Key] = set()  # prefetched and not requested yet
        self._awaited: set[Key] = set()  # of these, those whose layer was not called yet

    def __len__(self) -> int:
        """The number of experts held."""
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        """Whether the expert (layer, expert) is held."""
        return key in self._held

    def clear(self) -> None:
        """Forgets all experts; counts stay."""
        for experts in (self._held, self._unused, self._awaited):
            experts.clear()

    def call(self, layer: int, needed: Sequence[int]) -> tuple[list[Key], list[Load]]:
        """Decides a call: the experts held, to be used first, and those to read and use after that, in order."""
        self.policy.record(layer, list(needed))
        keys = [(layer, expert) for expert in needed]
        hits = [key for key in keys if key in self._held]
        self.statistics.requests += len(keys)
        self.statistics.hits += len(hits)
        self.statistics.misses += len(keys) - len(hits)
        self.statistics.useful += len(self._unused.intersection(hits))
        self._unused.difference_update(hits)
        self._awaited = {key for key in self._awaited if key[0] != layer}
        misses = sorted((key for key in keys if key not in self._held), key=self.policy.rank)
        if isinstance(self.policy, Belady):  # a bound, not a cache: it may evict the expert that was just used
            return hits, [self._load(key, self._victim(layer, [*self._evictable(layer, False), key])) for key in misses]
        streams = len(keys) > max(self._budget[layer], self._top_k)
        return hits, [self._load(key, self._victim(layer, self._evictable(layer, streams))) for key in misses]

    def prefetch(
        self,
        layer: int,
        experts: Sequence[int],
        needed: Sequence[Key],
        is_worth: Callable[[Key, Key | None], bool] | None = None,
    ) -> list[Load]:
        """Decides which of a layer's experts to read before they are requested.

        A prefetch never evicts an expert that the current call needs, nor one prefetched for a layer that was not
        called yet; if there is no other, it is dropped. `is_worth` is asked about each expert and what it would evict.
        """
        loads = []
        for key in [(layer, expert) for expert in experts if (layer, expert) not in self._held]:
            kept = self._awaited.union(needed)
            evictable = [other for other in self._evictable(layer, False) if other not in kept]
            if self._is_full(layer) and not evictable:
                break
            victim = self._victim(layer, evictable)
            if is_worth and not is_worth(key, victim):
                continue
            loads.append(self._load(key, victim))
            self.statistics.prefetched += 1
            self.statistics.prefetch_evictions += loads[-1].victim is not None
            self._unused.add(key)
            self._awaited.add(key)
        return loads

    def drop(self, key: Key) -> None:
        """Removes an expert: it was evicted, or could not be read."""
        self._held.pop(key, None)
        self._unused.discard(key)
        self._awaited.discard(key)

    def _is_full(self, layer: int) -> bool:
        if self._per_layer:
            return sum(held == layer for held, _ in self._held) >= self._budget[layer]
        return len(self._held) >= self.capacity

    def _evictable(self, layer: int, streams: bool) -> list[Key]:
        """The experts that may be evicted for one of a layer, whose call streams through its share or not."""
        own = [key for key in self._held if key[0] == layer]
        if self._per_layer or (streams and len(own) >= max(1, self._budget[layer])):
            return own
        return [key for key in self._held if key not in self._awaited] or list(self._held)

    def _victim(self, layer: int, evictable: list[Key]) -> Key | None:
        return min(evictable, key=self.policy.rank) if self._is_full(layer) else None

    def _load(self, key: Key, victim: Key | None) -> Load:
        if victim:
            self.statistics.evictions += 1
            self.drop(victim)
        if victim != key:
            self._held[key] = None
        return Load(key, victim)
