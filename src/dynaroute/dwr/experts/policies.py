"""Eviction policies of a cache.

A policy sees every call (the experts that one pass of a layer needs) and ranks experts; the cache evicts the held one
that ranks lowest. All but `Belady` are online: they know only the past.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any, Protocol

from dynaroute.config.dwr import PolicyName

Key = tuple[int, int]  # (layer, expert)


class Policy(Protocol):
    """The interface of all policies."""

    def record(self, layer: int, needed: list[int]) -> None:
        """Records a call, before anything is evicted for it."""

    def rank(self, key: Key) -> Any:
        """How worth keeping an expert is, held or not; of equal ones, the one that was read first is evicted."""


class LRU:
    """Evicts the least recently used."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        for expert in needed:
            self._clock += 1
            self._last[layer, expert] = self._clock

    def rank(self, key: Key) -> int:
        """When it was last used."""
        return self._last.get(key, 0)


class LFU(LRU):
    """Evicts the least frequently used, of equals the least recently used; evicted experts keep their count."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[Key, int] = defaultdict(int)

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        super().record(layer, needed)
        for expert in needed:
            self._uses[layer, expert] += 1

    def rank(self, key: Key) -> tuple[int, int]:
        """How often it was used, then when it was last used."""
        return self._uses[key], super().rank(key)


class Pinned(LRU):
    """Keeps the most frequent experts, by a frequency [L][E] measured before; the others share the remaining room."""

    def __init__(self, frequency: list[list[float]]) -> None:
        super().__init__()
        self._frequency = frequency

    def rank(self, key: Key) -> tuple[float, int]:
        """Its frequency, then when it was last used."""
        layer, expert = key
        return self._frequency[layer][expert], super().rank(key)


class WeightedLRU:
    """Frequency-weighted LRU: evicts the smallest sum of past uses, where a use counts half after `half_life` calls.

    This is LRFU (Lee et al., 2001), with time counted in calls of the expert's layer, that is, in tokens.

    Attributes:
        half_life: of a use, in calls. Of 4 to 32, 8 had the most hits on the validation split of the default run, at a
            third of the experts.
    """

    half_life = 8.0

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._keep = 0.5 ** (1 / self.half_life)
        self._weight = [[0.0] * num_experts for _ in range(num_layers)]

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        weights = self._weight[layer]
        for expert in range(len(weights)):
            weights[expert] *= self._keep
        for expert in needed:
            weights[expert] += 1 - self._keep

    def rank(self, key: Key) -> float:
        """The weighted share of recent calls that used it."""
        layer, expert = key
        return self._weight[layer][expert]


class NextUse(WeightedLRU):
    """Evicts the expert expected to be used last. LRU ignores that layers take turns, and that experts follow others.

    If every token uses an expert with probability p, and its layer is called again in d tokens (a fraction: the layers
    in between, over all layers), the discounted value of its next use is `discount^d * p / (1 - (1 - p) * discount)`,
    the mean of `discount^(time to next use)`. p is the mean of two estimates: the weighted share of recent calls that
    used it; and the share of calls that used it among those after a use of the experts that its layer used last. The
    latter are counted from the start, after one call with the first estimate.

    Attributes:
        discount: of a use one token later. Chosen on the validation split of the default run, where it matters little:
            at a third of the experts, hit rates with 0.03 to 0.6 were within 0.003 of one another.
    """

    discount = 0.1

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        # By layer and expert: the calls that followed a use of it, and how many of them used each expert.
        self._followers = [[0] * num_experts for _ in range(num_layers)]
        self._followed_by = [[[0] * num_experts for _ in range(num_experts)] for _ in range(num_layers)]
        self._last: list[list[int]] = [[] for _ in range(num_layers)]
        self._probability = [[0.0] * num_experts for _ in range(num_layers)]

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        super().record(layer, needed)
        followers, followed_by = self._followers[layer], self._followed_by[layer]
        for before in self._last[layer]:
            followers[before] += 1
            for expert in needed:
                followed_by[before][expert] += 1
        calls = 1 + sum(followers[expert] for expert in needed)
        for expert, recent in enumerate(self._weight[layer]):
            uses = recent + sum(followed_by[before][expert] for before in needed)
            self._probability[layer][expert] = (recent + uses / calls) / 2
        self._last[layer], self._layer = needed, layer

    def rank(self, key: Key) -> float:
        """The discounted value of its next use."""
        layer, expert = key
        num_layers = len(self._weight)
        distance = ((layer - self._layer - 1) % num_layers + 1) / num_layers
        probability = self._probability[layer][expert]
        return self.discount**distance * probability / (1 - (1 - probability) * self.discount)


class Belady:
    """Belady's MIN (1966): evicts the expert needed again last. It knows the future calls, so it is a bound.

    For replays only. Since a call needs several experts at a time, MIN is the optimum only if it may evict the expert
    that was just used, which a cache that has to put it somewhere cannot do.
    """

    def __init__(self, calls: Iterable[tuple[int, list[int]]]) -> None:
        self._calls = [(layer, sorted(needed)) for layer, needed in calls]
        self._now = 0
        self._uses: dict[Key, deque[int]] = defaultdict(deque)
        for time, (layer, needed) in enumerate(self._calls, 1):
            for expert in needed:
                self._uses[layer, expert].append(time)

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`.

        Raises:
            ValueError: this is not the next call of the trace.
        """
        if self._now == len(self._calls) or self._calls[self._now] != (layer, sorted(needed)):
            raise ValueError(f"call {self._now} is not that of MIN's trace")
        self._now += 1
        for expert in needed:
            self._uses[layer, expert].popleft()

    def rank(self, key: Key) -> float:
        """Minus the time of its next use."""
        uses = self._uses[key]
        return -uses[0] if uses else -float("inf")


def make_policy(name: PolicyName, frequency: list[list[float]]) -> Policy:
    """An online policy by name, for experts of the given frequency [L][E]."""
    match name:
        case "lru":
            return LRU()
        case "lfu":
            return LFU()
        case "weighted_lru":
            return WeightedLRU(len(frequency), len(frequency[0]))
        case "pinned":
            return Pinned(frequency)
        case "next_use":
            return NextUse(len(frequency), len(frequency[0]))
