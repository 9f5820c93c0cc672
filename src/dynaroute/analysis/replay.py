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
    from dynaroute.dwr.experts.prefetch import Prefetcher

Predictions = list[list[list[int]]]  # [tokens][L - 1]: the experts predicted for the layer after each


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
            prefetcher.predict(layer, _scores(ahead, num_experts), _scores(chosen, num_experts)).experts
            for layer, (chosen, ahead) in enumerate(zip(token, orders, strict=False))
        ]
        for token, orders in zip(trace.experts, trace.lookahead, strict=True)
    ]


def _scores(order: np.ndarray, num_experts: int) -> Tensor:
    """Scores [1, E] of a router that ranks these experts first, in this order, and the others last."""
    scores = torch.zeros(1, num_experts)
    scores[0, order.astype(np.int64)] = 1 - torch.arange(len(order)) / num_experts
    return scores


def replay(trace: Trace, residency: Residency, predictions: Predictions | None = None) -> list[Call]:
    """Replays a trace through an empty cache, which prefetches what is predicted; its statistics are `residency`'s."""
    calls = []
    for number, token in enumerate(np.sort(trace.experts).tolist()):  # in the order in which a model requests them
        for layer, needed in enumerate(token):
            hits, loads = residency.call(layer, needed)
            missing = [load.key for load in loads]
            used, ahead = [*hits, *missing], []
            if predictions and layer + 1 < len(token):
                experts = predictions[number][layer]
                residency.statistics.predicted += len(needed)
                residency.statistics.predicted_right += len(set(experts) & set(token[layer + 1]))
                ahead = [load.key for load in residency.prefetch(layer + 1, experts, used)]
            calls.append(Call(missing, ahead, used))
    return calls


def ratio_to_resident(calls: list[Call], seconds: Seconds) -> float:
    """The speed of a replay relative to a model with all experts resident."""
    now = channel_free = asked = 0.0
    arrival: dict[Key, float] = {}  # of experts that were read
    expected: list[Key] = []  # predicted at `asked`
    for call in calls:
        now += seconds.dense
        for key in expected:
            if (begin := max(channel_free, asked)) < now:  # otherwise it is not read
                channel_free = arrival[key] = begin + seconds.read
        for key in (*call.missing, *call.ahead):
            arrival.pop(key, None)  # from before it was evicted
        for key in call.used:
            if key not in arrival:
                channel_free = arrival[key] = max(channel_free, now) + seconds.read
        expected, asked = call.ahead, now
        for key in call.used:
            now = max(now, arrival[key]) + seconds.expert
    return sum(seconds.dense + len(call.used) * seconds.expert for call in calls) / now
