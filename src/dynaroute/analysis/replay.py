"""Replays a trace of routing through the decisions of a cache, to simulate other policies, sizes and machines.

Hits and misses are those of `experts.residency`, as in the cache itself, and predictions those of its prefetchers.
Times come from a model in which everything is bound by bytes: computing with weights takes their size over one
bandwidth, reading an expert takes a latency and its size over another, while the layer computes.

As in the cache, needed experts are read in the order of their use, ahead of predicted ones; and a predicted expert
whose read has not begun when its layer is called is not read, unless it is needed then. The cache differs in three
ways: it reads needed and predicted experts at the same time, where here there is one channel; it begins a read only
once the expert to evict was used; and predictions, bookkeeping and threads take time.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaroute.analysis.traces import Trace
from dynaroute.config.dwr import SimulatedMachine, SimulatedModel
from dynaroute.dwr.experts.policies import Key
from dynaroute.dwr.experts.residency import Residency

if TYPE_CHECKING:
    from dynaroute.dwr.experts.payoff import Payoff
    from dynaroute.dwr.experts.prefetch import Prediction, Prefetcher

Predictions = list[list["Prediction"]]  # [tokens][L - 1]: for the layer after each


class Seconds(NamedTuple):
    """Durations."""

    read: float  # of reading an expert
    expert: float  # of computing with one
    dense: float  # of computing the rest of a layer

    @classmethod
    def of(cls, machine: SimulatedMachine, model: SimulatedModel) -> "Seconds":
        """The durations for a model on a machine."""
        expert, dense = model.expert_mib * 2**20, model.dense_mib * 2**20
        compute = machine.compute_gb_per_second * 1e9
        read = machine.read_latency_us / 1e6 + expert / (machine.read_gb_per_second * 1e9)
        return cls(read, expert / compute, dense / compute)


class Call(NamedTuple):
    """What a cache did for one call, in this order."""

    missing: list[Key]  # read because they are needed
    ahead: list[Key]  # read because the next layer is predicted to need them
    used: list[Key]


def predict(prefetcher: "Prefetcher", trace: Trace) -> Predictions:
    """A prefetcher's predictions on a trace.

    A layer's state, which a trace does not hold, is replaced by the next router's scores for it: a `GatePrefetcher`
    needs `nn.Identity` modules as routers.
    """
    num_experts = trace.lookahead.shape[2]
    return [
        [
            prefetcher.predict(layer, scores[None], _scores(chosen, num_experts))
            for layer, (chosen, scores) in enumerate(zip(token, ahead, strict=False))
        ]
        for token, ahead in zip(trace.experts, torch.from_numpy(trace.lookahead), strict=True)
    ]


def _scores(order: np.ndarray, num_experts: int) -> Tensor:
    """Scores [1, E] of a router that ranks these experts first, in this order, and the others last."""
    scores = torch.zeros(1, num_experts)
    scores[0, order.astype(np.int64)] = 1 - torch.arange(len(order)) / num_experts
    return scores


class Clock:
    """The time that calls take.

    Attributes:
        now: seconds since the start.
        busy_until: when the channel has read what it was asked for.
        late: hits that were not read yet when they were requested.
    """

    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds
        self.now = self.busy_until = self._asked = self._resident = 0.0
        self.late = 0
        self._arrival: dict[Key, float] = {}  # of experts that were read
        self._expected: list[Key] = []  # predicted at `asked`

    def request(self, missing: list[Key], used: list[Key]) -> tuple[int, float]:
        """Begins a call: how many experts it has to read, and the seconds left of a read that is under way."""
        seconds, arrival = self.seconds, self._arrival
        self.now += seconds.dense
        for key in self._expected:
            if (begin := max(self.busy_until, self._asked)) < self.now:  # otherwise it is not read
                self.busy_until = arrival[key] = begin + seconds.read
        for key in missing:
            arrival.pop(key, None)  # from before it was evicted
        busy = max(0.0, self.busy_until - self.now)
        unread = [key for key in used if key not in arrival]
        self.late += sum(arrival.get(key, self.now + 1) > self.now for key in used) - len(missing)
        for key in unread:
            self.busy_until = arrival[key] = max(self.busy_until, self.now) + seconds.read
        self._asked = self.now
        return len(unread), busy

    def compute(self, ahead: list[Key], used: list[Key]) -> None:
        """Ends the call, while experts are read ahead."""
        for key in ahead:
            self._arrival.pop(key, None)
        self._expected = ahead
        for key in used:
            self.now = max(self.now, self._arrival[key]) + self.seconds.expert
        self._resident += self.seconds.dense + len(used) * self.seconds.expert

    @property
    def ratio_to_resident(self) -> float:
        """The speed relative to a model with all experts resident."""
        return self._resident / self.now


def replay(
    trace: Trace,
    residency: Residency,
    predictions: Predictions | None = None,
    clock: Clock | None = None,
    payoff: "Payoff | None" = None,
) -> list[Call]:
    """Replays a trace through an empty cache, which prefetches what is predicted; its statistics are `residency`'s.

    With a payoff, which needs a clock, it follows only predictions that are worth it.
    """
    calls = []
    for number, token in enumerate(np.sort(trace.experts).tolist()):  # in the order in which a model requests them
        for layer, needed in enumerate(token):
            hits, loads = residency.call(layer, needed)
            missing = [load.key for load in loads]
            used, ahead = [*hits, *missing], []
            reads, busy = clock.request(missing, used) if clock else (0, 0.0)
            if payoff:
                payoff.called(layer, needed, len(missing), [load.victim for load in loads])
                for average, duration in zip((payoff.read, payoff.expert, payoff.dense), clock.seconds, strict=True):
                    average.add(duration)
            if predictions and layer + 1 < len(token) and (not payoff or payoff.wants_prediction(layer)):
                prediction = predictions[number][layer]
                residency.statistics.predicted += len(needed)
                residency.statistics.predicted_right += len(set(prediction.experts) & set(token[layer + 1]))
                if payoff:
                    payoff.plan(prediction, len(used) - reads, reads, busy)
                ahead = [load.key for load in residency.prefetch(*prediction[:2], used, payoff and payoff.is_worth)]
            if clock:
                clock.compute(ahead, used)
            calls.append(Call(missing, ahead, used))
    if clock:
        residency.statistics.late = clock.late
    return calls


def timed(calls: list[Call], seconds: Seconds) -> Clock:
    """The clock after a replay without one, whose decisions depend on no times."""
    clock = Clock(seconds)
    for call in calls:
        clock.request(call.missing, call.used)
        clock.compute(call.ahead, call.used)
    return clock


def ratio_to_resident(calls: list[Call], seconds: Seconds) -> float:
    """The speed of a replay relative to a model with all experts resident."""
    return timed(calls, seconds).ratio_to_resident
