"""Eviction policies of a cache.

A policy sees every call (the experts that one pass of a layer needs) and ranks experts; the cache evicts the held one
that ranks lowest. All but `Belady` are online: they know only the past.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

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


class LeastStale:
    """Evicts the stalest: an expert unused for most calls of its own layer; of equals, the one whose layer runs last.

    This is how we read Least-Stale (Hoang et al., 2026). LRU, which counts calls of all layers, evicts first the
    experts whose layer is about to run; here all experts of the token before are equally stale.
    """

    def __init__(self, num_layers: int) -> None:
        self._calls = [0] * num_layers
        self._used: dict[Key, int] = {}  # call of its layer
        self._layer = 0

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        self._calls[layer] += 1
        self._layer = layer
        self._used.update(((layer, expert), self._calls[layer]) for expert in needed)

    def age(self, key: Key) -> int:
        """Calls of its layer since its last use, all of them if it was not used."""
        return self._calls[key[0]] - self._used.get(key, 0)

    def rank(self, key: Key) -> Any:
        """How fresh it is, then how soon its layer runs."""
        distance = (key[0] - self._layer - 1) % len(self._calls)
        return -self.age(key), -distance


class LFRU(LeastStale):
    """Evicts the least frequently recently used: the smallest number of uses over calls of its layer since the last."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._uses: dict[Key, int] = defaultdict(int)

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        super().record(layer, needed)
        for expert in needed:
            self._uses[layer, expert] += 1

    def rank(self, key: Key) -> float:
        """Uses, over the age of the last."""
        return self._uses[key] / (1 + self.age(key))


class TokenPath:
    """Evicts the expert expected to be used last, by what tokens use in the layers before.

    The odds that the next call of a layer uses an expert are those of its weighted share of recent calls, times a
    likelihood ratio for each call since: by how much tokens that used the same experts there used it more often than
    others. Ratios of the `REACH` layers before, and of the layer's own last call, are counted from the start. Of the
    time to the next use, `discount` per token, the mean is taken as in `NextUse`.

    Attributes:
        half_life: of a use in the weighted share, in calls of the layer. All constants were chosen on the validation
            split of the default run, by the share of the gap from the better LRU to MIN at five budgets.
        fading: of a likelihood ratio, for each call after it.
        discount: of a use one token later.
        prior: calls that a ratio of one counts for.
    """

    REACH = 4
    half_life, fading, discount, prior = 16.0, 0.6, 0.5, 20.0

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._keep = 0.5 ** (1 / self.half_life)
        self._recent = np.full((num_layers, num_experts), 1 / num_experts)
        self._uses, self._calls = np.zeros((num_layers, num_experts)), np.zeros(num_layers)
        # By distance from one call to a later one: uses of each expert in the first, and those of both.
        self._distances = sorted({*range(1, min(self.REACH, num_layers) + 1), num_layers})
        self._used = np.zeros((len(self._distances), num_layers, num_experts), np.float32)
        self._together = np.zeros((*self._used.shape, num_experts), np.float32)
        self._last: list[list[int]] = [[] for _ in range(num_layers)]
        self._evidence = np.zeros((num_layers, num_experts))  # logarithms of ratios, since a layer's last call

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        num_layers, num_experts = self._uses.shape
        uses = np.zeros(num_experts)
        uses[needed] = 1
        for index, distance in enumerate(self._distances):
            before = (layer - distance) % num_layers
            self._used[index, before, self._last[before]] += 1
            self._together[index, before, self._last[before]] += uses
        self._recent[layer] += (1 - self._keep) * (uses - self._recent[layer])
        self._uses[layer] += uses
        self._calls[layer] += 1
        self._last[layer] = needed
        self._evidence *= self.fading
        self._evidence[layer] = 0
        share = (self._uses + 4 * len(needed) / num_experts) / (self._calls[:, None] + 4)
        for index, distance in enumerate(self._distances):
            after = (layer + distance) % num_layers
            together = self._together[index, layer, needed].sum(0) + self.prior * share[after]
            given = together / (self._used[index, layer, needed].sum() + self.prior)
            self._evidence[after] += _log_odds(given) - _log_odds(share[after])
        following = 1 / (1 + np.exp(-_log_odds(self._recent) - self._evidence))
        tokens = ((np.arange(num_layers) - layer - 1) % num_layers + 1) / num_layers
        later = self.discount * self._recent / (1 - (1 - self._recent) * self.discount)
        self._value = self.discount ** tokens[:, None] * (following + (1 - following) * later)

    def rank(self, key: Key) -> float:
        """The discounted value of its next use."""
        return self._value[key]


def _log_odds(probability: np.ndarray) -> np.ndarray:
    probability = probability.clip(0.01, 0.99)
    return np.log(probability / (1 - probability))


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
        case "least_stale":
            return LeastStale(len(frequency))
        case "lfru":
            return LFRU(len(frequency))
        case "token_path":
            return TokenPath(len(frequency), len(frequency[0]))
