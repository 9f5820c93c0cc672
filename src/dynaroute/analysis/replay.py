"""A trace replayed through the bookkeeping of a cache, for policies, sizes and machines that cannot be run here.

Hits and misses are those of `experts.residency`, as in the cache itself. Times come from a model in which everything is
bound by bytes: computing with weights takes their size over one bandwidth, bringing an expert takes a latency and its
size over another, while the layer computes.

As in the cache, what is needed is brought in the order of its use, ahead of what is only expected; and an expected
expert that is not begun when its layer comes is not brought, unless it is needed then. The cache differs in three
things: it reads what is needed and what is expected at the same time, where here there is one channel; it begins a read
only when what makes way for it was used; and foretelling, bookkeeping and threads take time.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dynaroute.analysis.traces import Trace
from dynaroute.config import PrefetchName, SimulatedMachine, SimulatedModel
from dynaroute.dwr.experts import Usage
from dynaroute.dwr.experts.policies import Key
from dynaroute.dwr.experts.residency import Residency

Foretell = Callable[[int, int], list[int]]  # (token, layer) -> experts of the layer after it


class Seconds(NamedTuple):
    """What things take."""

    read: float  # to bring an expert
    expert: float  # to compute with one
    dense: float  # to compute the rest of a layer

    @classmethod
    def of(cls, machine: SimulatedMachine, model: SimulatedModel) -> "Seconds":
        """The times of a model on a machine."""
        expert, dense = model.expert_mib * 2**20, model.dense_mib * 2**20
        compute = machine.compute_gb_per_second * 1e9
        read = machine.read_latency_us / 1e6 + expert / (machine.read_gb_per_second * 1e9)
        return cls(read, expert / compute, dense / compute)


class Call(NamedTuple):
    """What a cache did for one call, in this order."""

    missing: list[Key]  # brought because they are needed
    ahead: list[Key]  # brought because the next layer is expected to need them
    used: list[Key]


def replay(trace: Trace, residency: Residency, foretell: Foretell | None = None) -> list[Call]:
    """Replays a trace through an empty cache, whose statistics say what it did; `foretell` says what to prefetch."""
    calls, last_layer = [], trace.experts.shape[1] - 1
    for number, token in enumerate(np.sort(trace.experts).tolist()):  # as a model asks for those of one token
        for layer, needed in enumerate(token):
            hits, loads = residency.call(layer, needed)
            missing = [load.key for load in loads]
            used, ahead = [*hits, *missing], []
            if foretell and layer < last_layer:
                experts = foretell(number, layer)
                residency.statistics.foretold += len(needed)
                residency.statistics.foretold_right += len(set(experts) & set(token[layer + 1]))
                ahead = [load.key for load in residency.prefetch(layer + 1, experts, used)]
            calls.append(Call(missing, ahead, used))
    return calls


def ratio_to_resident(calls: list[Call], seconds: Seconds) -> float:
    """The speed of a replay relative to a model whose experts are all there."""
    now = channel_free = asked = 0.0
    arrival: dict[Key, float] = {}  # of what was brought
    expected: list[Key] = []  # since `asked`
    for call in calls:
        now += seconds.dense
        for key in expected:
            if (begin := max(channel_free, asked)) < now:  # else it is not brought
                channel_free = arrival[key] = begin + seconds.read
        for key in (*call.missing, *call.ahead):
            arrival.pop(key, None)  # of an earlier stay
        for key in call.used:
            if key not in arrival:
                channel_free = arrival[key] = max(channel_free, now) + seconds.read
        expected, asked = call.ahead, now
        for key in call.used:
            now = max(now, arrival[key]) + seconds.expert
    return sum(seconds.dense + len(call.used) * seconds.expert for call in calls) / now


def make_foretell(name: PrefetchName, trace: Trace, usage: Usage, m: int) -> Foretell | None:
    """What a prefetcher of `m` experts foretells on a trace."""
    load, transitions = np.array(usage.load), np.array(usage.transitions, float)  # [L, E], [L-1, E, E]
    match name:
        case "none":
            return None
        case "frequency":
            most_used = np.argsort(-load, axis=-1, kind="stable")[:, :m].tolist()
            return lambda token, layer: most_used[layer + 1]
        case "transition":
            share = transitions / transitions.sum(-1, keepdims=True).clip(min=1)
            return lambda token, layer: np.argsort(-share[layer, trace.experts[token, layer]].sum(0))[:m].tolist()
        case "gate":
            return lambda token, layer: trace.lookahead[token, layer, :m].tolist()
