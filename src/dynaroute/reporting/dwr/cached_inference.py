"""reports/cached_inference.md: what caching experts costs and gains, by policy, prefetcher, precision and machine.

The sentences stand in templates/cached_inference.md. Nothing here is measured but the benchmark against peers, which
the default pipeline does not run.
"""

from typing import TYPE_CHECKING, Any

from dynaroute.reporting.dwr.findings import best_online, gap_closed
from dynaroute.reporting.dwr.results import Cached
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.pages import render

if TYPE_CHECKING:
    import pandas as pd

GOAL = 1 / 3  # of the gap between LRU and MIN
NEAR = 0.9  # of the resident speed


def page(cached: Cached, peers: Record | None) -> str:
    """The page as Markdown; `peers` is the benchmark against them, None if it was not run."""
    simulation, hits = cached.simulation, cached.hits
    third, policy = simulation["capacity_nearest_a_third"], best_online(simulation["hit_rate"])
    settings, shared, shares = best_settings(cached), gap_closed(hits, False), gap_closed(hits, True)
    return render(
        "cached_inference.md",
        {
            "cached": cached,
            "failed": [
                name.replace("_", " ")
                for record in (cached.summary, simulation)
                for name, passed in record["checks"].items()
                if passed is False
            ],
            "third": third,
            "policy": policy,
            "gap_closed": at(shared, policy, third),
            "gap_closed_per_layer": at(shares, policy, third),
            "goal": GOAL,
            "near": NEAR,
            "rows": {
                "hits": hits[~hits["per_layer"]],
                "closed": shared.reset_index().melt("capacity"),
                "closed_better": gap_closed(hits, False, better=True).reset_index().melt("capacity"),
                "third": _at_a_third(hits, third),
                "cells": cached.cells[cached.cells["capacity"] == third],
                "accuracies": _accuracies(cached),
                "precisions": [
                    {**row, "loss": row["nll"] - cached.export["precisions"][0]["nll"]}
                    for row in cached.export["precisions"]
                ],
                "places": places(settings, third),
                "recommended": _recommended(settings, cached.summary["expert_file_bytes"]),
                "peers": [{**row, "late_rate": row.get("late_rate")} for row in peers["rows"]] if peers else [],
            },
            "by_place": [(name, ", ".join(name)) for name, _ in settings.groupby(["machine", "model"], sort=False)],
            "by_prefetcher": [(name, name, ".3f") for name in settings["prefetch"].unique()],
            "peers": peers,
            "missed": missed_goals(peers) if peers else [],
            "apart": told_apart(peers["rows"]) if peers else [],
        },
    )


def at(closed: "pd.DataFrame", policy: str, capacity: int) -> float | None:
    """The share of the gap that a policy closes at a capacity, from `gap_closed`; None if there is no gap there."""
    share = closed[policy].get(capacity) if policy in closed else None
    return share if share == share else None


def missed_goals(peers: Record) -> list[dict[str, Any]]:
    """Goals that were missed, and why, as far as other measurements of the same benchmark tell.

    `bound`: all experts resident miss it as well. Otherwise what a token's misses cost, in ms, at the cost of one more
    read, beside the token's time with and without a cache.
    """
    rows, use = {(row["name"], row["page_cache"]): row for row in peers["rows"]}, peers["use_of_an_expert_ms"]
    missed = []
    for goal in peers["goals"]:
        if goal["value"] >= goal["goal"]:
            continue
        missed.append({"goal": goal, "bound": goal["resident_value"] < goal["goal"]})
        if not missed[-1]["bound"]:
            own = rows[goal["candidate"], goal["page_cache"]]
            late, place = own.get("late_rate"), "on disk" if goal["page_cache"] == "cold" else "in the page cache"
            missed[-1] |= {
                "misses": (1 - own["hit_rate"]) * peers["experts_per_token"],
                "read_ms": use[place] - use["held"],
                "late": None if late is None else late * peers["experts_per_token"],
                "token_ms": 1000 / own["tokens_per_second"],
                "resident_ms": 1000 / peers["rows"][0]["tokens_per_second"],
            }
    return missed


def told_apart(rows: list[Record]) -> list[dict[str, Any]]:
    """For each state of the page cache, which of our cached settings are faster than which, their ranges apart."""
    found = []
    for state in dict.fromkeys(row["page_cache"] for row in rows):
        own = [row for row in rows if row["page_cache"] == state and row["hit_rate"] is not None]
        pairs = [(a["name"], b["name"]) for a in own for b in own if a["ratio_lowest"] > b["ratio_highest"]]
        if len(own) > 1:
            found.append({"page_cache": state, "settings": len(own), "pairs": pairs})
    return found


def best_settings(cached: Cached) -> "pd.DataFrame":
    """Simulated speeds with, for each capacity, the online policy that hits most; that rate is `trace_hit_rate`."""
    online = cached.hits[(cached.hits["policy"] != "min") & ~cached.hits["per_layer"]]
    best = online.loc[online.groupby("capacity")["hit_rate"].idxmax(), ["capacity", "policy", "hit_rate"]]
    return cached.speeds.merge(best.rename(columns={"hit_rate": "trace_hit_rate"}), on=["capacity", "policy"])


def places(settings: "pd.DataFrame", third: int) -> list[dict[str, Any]]:
    """For each machine and model, the simulated speed by prefetcher at a third of the experts, from `best_settings`.

    `helps`: whether a prefetcher is faster than none. `enough`: the least capacity with `NEAR` of the resident speed.
    """
    rows = []
    for (machine, model), own in settings.groupby(["machine", "model"], sort=False):
        ratios = own[own["capacity"] == third].set_index("prefetch")["ratio_to_resident"]
        near = own.loc[own["ratio_to_resident"] >= NEAR, "capacity"]
        helps = "none" in ratios and ratios.max() > ratios["none"]
        rows.append({"machine": machine, "model": model, **ratios, "helps": helps, "enough": near.min()})
    return rows


def _recommended(settings: "pd.DataFrame", expert_bytes: int) -> list[dict[str, Any]]:
    """For each capacity the policy, and for each machine and model the fastest prefetcher, from `best_settings`."""
    rows = []
    for (capacity, policy, rate), own in settings.groupby(["capacity", "policy", "trace_hit_rate"]):
        fastest = own.loc[own.groupby(["machine", "model"], sort=False)["ratio_to_resident"].idxmax()]
        cells = {
            (row.machine, row.model): f"{row.ratio_to_resident:.3f} ({row.prefetch})" for row in fastest.itertuples()
        }
        rows.append(
            {"capacity": capacity, "bytes": capacity * expert_bytes, "policy": f"`{policy}`", "rate": rate, **cells}
        )
    return rows


def _at_a_third(hits: "pd.DataFrame", third: int) -> list[dict[str, Any]]:
    """Hit rates of each policy under one budget and with a share per layer, of the trace and of uniform routing."""
    own = hits[hits["capacity"] == third].set_index("policy")
    one, shares, closed = own[~own["per_layer"]], own[own["per_layer"]], gap_closed(hits, per_layer=True)
    return [
        {
            **{"policy": f"`{policy}`", "one": row["hit_rate"], "uniform": row["uniform_hit_rate"]},
            "shares": shares["hit_rate"].get(policy),
            "uniform_shares": shares["uniform_hit_rate"].get(policy),
            "closed": at(closed, policy, third),
        }
        for policy, row in one.iterrows()
    ]


def _accuracies(cached: Cached) -> list[dict[str, Any]]:
    """For each prefetcher, the share of needed experts that it predicted: while decoding, and on the trace."""
    decoding, trace = (
        frame.groupby("prefetch", sort=False)["accuracy"].first() for frame in (cached.cells, cached.speeds)
    )
    return [{"prefetch": name, "decoding": decoding.get(name), "trace": trace[name]} for name in trace.index]
