"""Which experts are held: the bookkeeping of a cache, without weights.

The cache (`cache.py`) carries out what is decided here, and the simulator replays a trace through it, so both hit and
miss alike. Nothing here depends on time: the same calls lead to the same experts, however long a read takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Self

from dynaroute.dwr.experts.policies import Belady, Key, Policy
from dynaroute.errors import DynarouteError


@dataclass
class CacheStatistics:
    """What a cache did. A request is one expert that one call needs, for any number of tokens.

    The first counts are decisions, the same on every run and in a replay. The last are what then took place, which
    depends on speed: what was to be prefetched is not read if it makes way, or its layer comes, before its turn.
    """

    requests: int = 0
    hits: int = 0  # held when asked for, or to be prefetched by then
    misses: int = 0
    evictions: int = 0
    prefetched: int = 0  # experts to be read before they are asked for
    useful: int = 0  # of these, asked for while held
    prefetch_evictions: int = 0  # of the evictions, those that made way for a prefetch
    foretold: int = 0  # requests that a prediction was made for
    foretold_right: int = 0  # of these, those that it named
    # What depends on the machine's speed is no part of equality.
    reads: int = field(default=0, compare=False)  # experts read from the store
    reads_ahead: int = field(default=0, compare=False)  # of these, begun by the prefetching thread
    used_ahead: int = field(default=0, compare=False)  # of these, used before they made way; the others were wasted
    late: int = field(default=0, compare=False)  # hits that were not there yet: on the way, or never begun
    wait_seconds: float = field(default=0.0, compare=False)  # that the caller waited for experts

    @property
    def hit_rate(self) -> float:
        """The share of requests that were hits; NaN without requests."""
        return self.hits / self.requests if self.requests else float("nan")

    @property
    def accuracy(self) -> float:
        """The share of requests that the prefetcher foretold, where it made a prediction; NaN where it made none."""
        return self.foretold_right / self.foretold if self.foretold else float("nan")

    def __add__(self, other: Self) -> Self:
        """Both together."""
        return type(self)(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


class Load(NamedTuple):
    """An expert that comes, and the one that makes way; None: there is room. Itself: it is not kept after use."""

    key: Key
    victim: Key | None


class Residency:
    """The experts held, at most `capacity`: of all layers together, or in equal shares of the layers.

    A call first uses what is held, so nothing that it needs makes way before it was used; then it fetches and uses what
    is missing, one after another, the most worth keeping last. A call that needs more experts than its layer's share
    (the prefill of a long prompt) passes through that share: the other layers keep what they hold.

    Attributes:
        statistics: counts since they were last taken.
    """

    def __init__(self, capacity: int, policy: Policy, num_layers: int, top_k: int, per_layer: bool = False) -> None:
        """Nothing is held at first.

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
        self._held: dict[Key, None] = {}  # in the order in which they were fetched
        self._unasked: set[Key] = set()  # prefetched, not asked for yet
        self._awaited: set[Key] = set()  # of these, those whose layer has not come yet

    def __len__(self) -> int:
        """The number of experts held."""
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        """Whether the expert (layer, expert) is held."""
        return key in self._held

    def call(self, layer: int, needed: Sequence[int]) -> tuple[list[Key], list[Load]]:
        """Decides a call: what is held, to be used first, and what is to be fetched and used after that, in order."""
        self.policy.record(layer, list(needed))
        keys = [(layer, expert) for expert in needed]
        hits = [key for key in keys if key in self._held]
        self.statistics.requests += len(keys)
        self.statistics.hits += len(hits)
        self.statistics.misses += len(keys) - len(hits)
        self.statistics.useful += len(self._unasked.intersection(hits))
        self._unasked.difference_update(hits)
        self._awaited = {key for key in self._awaited if key[0] != layer}
        misses = sorted((key for key in keys if key not in self._held), key=self.policy.rank)
        if isinstance(self.policy, Belady):  # a bound, not a cache: it keeps what it likes
            return hits, [self._load(key, [*self._evictable(layer, False), key]) for key in misses]
        passing = len(keys) > max(self._budget[layer], self._top_k)
        return hits, [self._load(key, self._evictable(layer, passing)) for key in misses]

    def prefetch(self, layer: int, experts: Sequence[int], needed: Sequence[Key]) -> list[Load]:
        """Decides which of a layer's experts to fetch before they are asked for.

        They take the place of nothing that the current call needs, nor of what another prefetch brought for a layer
        that is still to come; if nothing else is held, they are not fetched.
        """
        loads = []
        for key in [(layer, expert) for expert in experts if (layer, expert) not in self._held]:
            kept = self._awaited.union(needed)
            evictable = [other for other in self._evictable(layer, False) if other not in kept]
            if self._is_full(layer) and not evictable:
                break
            loads.append(self._load(key, evictable))
            self.statistics.prefetched += 1
            self.statistics.prefetch_evictions += loads[-1].victim is not None
            self._unasked.add(key)
            self._awaited.add(key)
        return loads

    def drop(self, key: Key) -> None:
        """Takes note that an expert is not held after all: it was not read."""
        self._held.pop(key, None)  # it may have made way already
        self._unasked.discard(key)
        self._awaited.discard(key)

    def _is_full(self, layer: int) -> bool:
        if self._per_layer:
            return sum(held == layer for held, _ in self._held) >= self._budget[layer]
        return len(self._held) >= self.capacity

    def _evictable(self, layer: int, passing: bool) -> list[Key]:
        """What may make way for an expert of a layer, whose call passes through its share of the cache or not."""
        own = [key for key in self._held if key[0] == layer]
        if self._per_layer or (passing and len(own) >= max(1, self._budget[layer])):
            return own
        return [key for key in self._held if key not in self._awaited] or list(self._held)

    def _load(self, key: Key, evictable: list[Key]) -> Load:
        victim = None
        if self._is_full(key[0]):
            victim = min(evictable, key=self.policy.rank)
            self.statistics.evictions += 1
            self.drop(victim)
        if victim != key:
            self._held[key] = None
        return Load(key, victim)
