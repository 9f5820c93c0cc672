"""Replays the trace of routing through caches of every size and policy, and on machines that are not at hand.

    python stages/dwr/simulate_cache.py

Reads   data/dwr/trace, data/dwr/expert_store (usage of experts)
Writes  reports/dwr/simulated_hits.csv        hit rates by capacity, policy (MIN among them) and kind of budget, beside
                                              those of as many tokens routed uniformly and independently
        data/dwr/simulation/speed.csv         speed relative to residency by capacity, machine, model and prefetcher,
                                              with the online policy that hits most; selective or not: following the
                                              predictions that are worth it, or all
        data/dwr/simulation/summary.json      hit rates at a third of the experts
"""

from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from dynaroute.analysis.replay import predict, replay
from dynaroute.analysis.speeds import record_ranks, speeds
from dynaroute.analysis.traces import Trace, load_trace, uniform_trace
from dynaroute.config import Settings
from dynaroute.dwr.experts.policies import Belady, make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics, Residency, nearest_a_third
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, write_csv, write_json
from dynaroute.pipeline.stage import run

STORE = Path("data/dwr/expert_store")
TRACE = Path("data/dwr/trace")
YARDSTICKS = ["lru", "min"]


def main(settings: Settings) -> None:
    """Replays, and writes the results."""
    store, trace, simulate = ExpertStore(STORE), load_trace(TRACE), settings.simulate_cache
    if trace.run != store.run:
        raise DynarouteError(f"{TRACE}: belongs to run {trace.run}, not {store.run}: run the stage trace_routing")
    config, experts, lookahead = store.config, store.num_experts, settings.benchmark_cache.lookahead
    policies, prefetchers = simulate.policies, simulate.prefetchers
    third, routings = nearest_a_third(experts, simulate.capacities), (trace, uniform_trace(trace))
    predictions = {
        name: predict(prefetcher, trace)
        for name in prefetchers
        if (prefetcher := make_prefetcher(name, store, [nn.Identity()] * config.num_layers, lookahead))
    }

    def run_one(trace: Trace, capacity: int, policy: str, per_layer: bool) -> CacheStatistics:
        chosen = Belady(trace.calls()) if policy == "min" else make_policy(policy, store.usage.load)
        residency = Residency(capacity, chosen, config.num_layers, config.top_k, per_layer)
        replay(trace, residency)
        return residency.statistics

    cells = [(capacity, policy, False) for capacity in simulate.capacities for policy in [*policies, "min"]]
    # Equal shares of the layers: all policies at a third of the experts, elsewhere what they are compared with.
    for capacity in simulate.capacities if "lru" in policies else [third]:
        if capacity >= config.num_layers:
            cells += [(capacity, policy, True) for policy in ([*policies, "min"] if capacity == third else YARDSTICKS)]
    hits = [
        {
            "capacity": capacity,
            "share_of_experts": capacity / experts,  # no online policy can expect more hits of uniform routing
            "policy": policy,
            "per_layer": per_layer,
            "requests": found.requests,
            "hit_rate": found.hit_rate,
            "uniform_hit_rate": uniform.hit_rate,
        }
        for capacity, policy, per_layer in tqdm(cells, desc="hit rates", unit="replay", disable=None)
        for found, uniform in [[run_one(routing, capacity, policy, per_layer) for routing in routings]]
    ]
    online = [row for row in hits if row["policy"] != "min" and not row["per_layer"]]
    best = {row["capacity"]: row["policy"] for row in sorted(online, key=lambda row: row["hit_rate"])}
    ranks = {
        name: record_ranks(make_policy(name, store.usage.load), trace, config.num_experts) for name in {*best.values()}
    }
    write_csv("reports/dwr/simulated_hits.csv", hits)
    with output_directory("data/dwr/simulation") as folder:
        write_csv(folder / "speed.csv", list(speeds(trace, best, ranks, predictions, simulate)))
        write_json(folder / "summary.json", summary(hits, store.run, len(trace.experts), third))


def summary(hits: list[dict[str, Any]], run_name: str, tokens: int, third: int) -> dict[str, Any]:
    """Hit rates at a third of the experts under one budget, and a check."""
    at_a_third = [row for row in hits if row["capacity"] == third and not row["per_layer"]]
    best = {(row["capacity"], row["per_layer"]): row["hit_rate"] for row in hits if row["policy"] == "min"}
    return {
        "run": run_name,
        "tokens": tokens,
        "capacity_nearest_a_third": third,
        "hit_rate": {row["policy"]: row["hit_rate"] for row in at_a_third},
        "checks": {
            "no_policy_beats_min": all(row["hit_rate"] <= best[row["capacity"], row["per_layer"]] for row in hits)
        },
    }


if __name__ == "__main__":
    run(main, __doc__)
