"""How fast a traced model would decode with cached experts on machines that are not at hand, with each prefetcher."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from dynaroute.analysis.replay import Clock, Predictions, Seconds, replay, timed
from dynaroute.analysis.traces import Trace
from dynaroute.config.dwr import SimulateCache
from dynaroute.dwr.experts.payoff import Payoff
from dynaroute.dwr.experts.policies import Key, Policy
from dynaroute.dwr.experts.residency import Residency


class Recorded:
    """A policy that has seen the trace it is replayed on: its ranks, which depend on calls alone, are made once."""

    def __init__(self, ranks: list[dict[Key, Any]]) -> None:
        """Starts before the first call; `ranks` are those after each, from `record_ranks`."""
        self._ranks = iter(ranks)
        self._now: dict[Key, Any] = {}

    def record(self, layer: int, needed: list[int]) -> None:
        """See `Policy`."""
        self._now = next(self._ranks)

    def rank(self, key: Key) -> Any:
        """See `Policy`."""
        return self._now[key]


def record_ranks(policy: Policy, trace: Trace, num_experts: int) -> list[dict[Key, Any]]:
    """The ranks of all experts, `num_experts` a layer, after each call of a trace."""
    keys = list(itertools.product(range(trace.experts.shape[1]), range(num_experts)))
    ranks = []
    for layer, needed in trace.calls():
        policy.record(layer, sorted(needed))  # in the order in which a replay requests them
        ranks.append({key: policy.rank(key) for key in keys})
    return ranks


def speeds(
    trace: Trace,
    policies: Mapping[int, str],
    ranks: Mapping[str, list[dict[Key, Any]]],
    predictions: Mapping[str, Predictions],
    simulate: SimulateCache,
) -> Iterator[dict[str, Any]]:
    """A row for each capacity, prefetcher, machine and model; selective where it follows what is worth it, or all.

    Args:
        trace: to replay.
        policies: name of the policy by capacity.
        ranks: of these policies.
        predictions: by prefetcher, all but `none`.
        simulate: capacities, prefetchers, machines and models.
    """
    _, num_layers, top_k = trace.experts.shape
    ways = [(name, selective) for name in simulate.prefetchers for selective in (False, True)[: 1 + (name != "none")]]
    places = list(itertools.product(simulate.machines.items(), simulate.models.items()))
    cells = list(itertools.product(simulate.capacities, ways))
    for capacity, (prefetch, selective) in tqdm(cells, desc="speeds", unit="prefetcher", disable=None):
        ahead, name = predictions.get(prefetch), policies[capacity]
        residency = Residency(capacity, Recorded(ranks[name]), num_layers, top_k)
        calls = [] if selective else replay(trace, residency, ahead)
        for (machine, on), (model, of) in places:
            seconds = Seconds.of(on, of)
            if selective:
                residency, clock = Residency(capacity, Recorded(ranks[name]), num_layers, top_k), Clock(seconds)
                replay(trace, residency, ahead, clock, Payoff(top_k))
            else:
                clock = timed(calls, seconds)
            found = residency.statistics
            yield {
                "machine": machine,
                "model": model,
                "capacity": capacity,
                "policy": name,
                "prefetch": prefetch,
                "selective": selective,
                "hit_rate": found.hit_rate,
                "late_rate": clock.late / found.requests,
                "accuracy": found.accuracy if found.predicted else None,
                "ratio_to_resident": clock.ratio_to_resident,
            }
