"""Whether reading a predicted expert ahead is expected to save more time than it costs.

All times and shares are measured while the model runs. Nothing here reads, waits or looks at a clock, so a replay makes
the decisions of the cache from simulated times.

Say that a read takes R, that it begins b from now, behind a read under way and those that this call needs, and that the
next layer is called T from now. Then o = min(R, T - b) of it is over by the call. The next layer needs K experts, of
which the share h is held, and computes e with each. If the prediction is right, with probability p, the wait for the
expert is shorter by o, or by less if the experts that are held keep the layer busy meanwhile. If it is wrong, the first
missing expert, if there is one, waits for the rest of the read. Experts that a prefetch evicts are requested again with
probability a, those that a demand read evicts with d; a right prediction replaces a demand read. It is followed if

    p min(o, max(0, R - h (K - 1) e))  -  (1 - p) (R - o) (1 - h^K)  -  (a - p d) R  >  caution R.

Making a prediction takes time as well. It is made where this is less than what recent ones were expected to save, and
otherwise for one token in `PROBE`.

This assumes that all reads take equally long, one after another; that a prefetch which has not begun when its layer is
called is not read; that requests are hits independently of each other; and that regretting an eviction costs one read.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from dynaroute.dwr.experts.policies import Key
from dynaroute.dwr.experts.prefetch import Prediction


class Average:
    """A mean that forgets: a value counts `keep` times as much as the one after it."""

    def __init__(self, prior: float = 0.0, weight: float = 0.0, keep: float = 0.99) -> None:
        """Starts as if there had been `weight` values of `prior`; zero without any."""
        self._sum, self._weight, self._keep = prior * weight, weight, keep

    def add(self, value: float) -> None:
        """Counts a value."""
        self._sum, self._weight = self._keep * self._sum + value, self._keep * self._weight + 1

    @property
    def value(self) -> float:
        """The mean so far."""
        return self._sum / self._weight if self._weight else 0.0


class Payoff:
    """Decides which predictions to follow, for calls of a single token. Those of more tokens are not followed.

    The probability of a prediction is the share of those before it that were used, among predictions of experts not
    held that the prefetcher thought as probable, to a unit of log odds; they count whether they were followed or not.

    Attributes:
        read: seconds of reading an expert.
        expert: seconds of computing with one. On a GPU, which computes later, it is too short: less is read ahead.
        dense: seconds of computing from one layer's last expert to the next layer's call.
        predicting: seconds of making a prediction and acting on it.
    """

    CAUTION = 0.05  # reads that a prefetch must be expected to save, for the errors of the estimates
    FIRST = 8  # predictions that are made in any case
    PROBE = 16  # tokens of which one is predicted for where predictions do not pay

    def __init__(self, top_k: int) -> None:
        self.read, self.expert, self.dense, self.predicting = Average(), Average(), Average(), Average()
        self._top_k = top_k
        self._hit = Average(0.5, 4)
        self._used: dict[int, Average] = {}  # by log odds
        self._regret = {ahead: Average(0.2, 4) for ahead in (False, True)}  # of evictions for a prefetch, or not
        self._evicted: dict[int, dict[Key, bool]] = defaultdict(dict)  # by layer, until it is called
        self._predicted: dict[int, dict[Key, int]] = defaultdict(dict)  # likewise, with log odds
        self._gain = Average()  # seconds that a prediction was expected to save, over all that was followed of it
        self._saved, self._made, self._tokens = 0.0, 0, 0

    def wants_prediction(self, layer: int) -> bool:
        """Whether a layer's prediction may save more time than it takes."""
        self._tokens += layer == 0
        pays = self._made < self.FIRST or self._gain.value > self.predicting.value
        return pays or self._tokens % self.PROBE == 0

    def called(self, layer: int, needed: Sequence[int], missing: int, victims: Sequence[Key | None]) -> None:
        """Learns from a call, of which some experts are missing, and others are evicted for them."""
        for (_, expert), odds in self._predicted.pop(layer, {}).items():
            self._used[odds].add(expert in needed)
        for (_, expert), ahead in self._evicted.pop(layer, {}).items():
            self._regret[ahead].add(expert in needed)
        for index in range(len(needed)):
            self._hit.add(index >= missing)
        for key in filter(None, victims):
            self._evicted[key[0]].setdefault(key, False)

    def plan(self, prediction: Prediction, ready: int, reads: int, busy: float) -> None:
        """Prepares `is_worth` for a prediction.

        Args:
            prediction: of the next layer.
            ready: experts of the current call that are in memory.
            reads: of it that are still to be read.
            busy: seconds left of a read under way.
        """
        if self._made:
            self._gain.add(self._saved)
        self._saved, self._made = 0.0, self._made + 1
        read, expert = self.read.value, self.expert.value
        self._begin, now = busy + reads * read, ready * expert
        for index in range(1, reads + 1):
            now = max(now, busy + index * read) + expert
        self._due = now + self.dense.value
        self._odds = {}
        for number, probability in zip(prediction.experts, prediction.probabilities, strict=True):
            odds = round(math.log(max(probability, 1e-3) / max(1 - probability, 1e-3)))
            self._odds[prediction.layer, number] = odds
            self._used.setdefault(odds, Average(probability, 4))

    def is_worth(self, key: Key, victim: Key | None) -> bool:
        """Whether to read an expert ahead, after those that it was true of, evicting another expert if there is one."""
        odds = self._predicted[key[0]][key] = self._odds[key]
        if victim:
            self._evicted[victim[0]].setdefault(victim, True)
        saving = self.saving(self._used[odds].value, victim is not None)
        worth = saving > self.CAUTION * self.read.value
        self._saved += worth * saving
        self._begin += worth * self.read.value
        return worth

    def saving(self, probability: float, evicts: bool) -> float:
        """The seconds that reading ahead an expert of a probability is expected to save: the formula above."""
        read, hit = self.read.value, self._hit.value
        over = min(read, self._due - self._begin)
        if over <= 0:  # its layer is called first
            return 0.0
        right = min(over, max(0.0, read - hit * (self._top_k - 1) * self.expert.value))
        wrong = (read - over) * (1 - hit**self._top_k)
        regret = evicts * (self._regret[True].value - probability * self._regret[False].value) * read
        return probability * right - (1 - probability) * wrong - regret
