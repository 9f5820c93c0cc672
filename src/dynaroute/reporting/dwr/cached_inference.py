"""What reports/cached_inference.md shows. Nothing is measured but the benchmark against peers.

The sentences are in templates/cached_inference.md.
"""

from typing import TYPE_CHECKING, Any

from dynaroute.reporting.dwr.findings import gap_closed
from dynaroute.reporting.dwr.results import Cached
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import ratio

if TYPE_CHECKING:
    import pandas as pd

NEAR = 0.9  # of the resident speed
GOAL = 1 / 3  # of the gap from the better LRU to MIN
KINDS = ("", "_all")  # of prefetching: of predictions that are worth it, or of all


def values(cached: Cached, peers: Record | None) -> dict[str, Any]:
    """What the template shows; `peers` is the benchmark against them, None if it was not run."""
    import pandas as pd

    simulation, hits = cached.simulation, cached.hits
    third, rates = simulation["capacity_nearest_a_third"], simulation["hit_rate"]
    policy = max((name for name in rates if name != "min"), key=rates.__getitem__)
    places, precisions = _places(cached, third), cached.export["precisions"]
    names = [name for name in cached.speeds["prefetch"].unique() if name != "none"]
    checks = {**cached.summary["checks"], **simulation["checks"]}
    gaps = {int(capacity): gap_closed(hits, False, capacity, better=True) for capacity in hits["capacity"].unique()}
    closed = {capacity: found[policy] for capacity, found in gaps.items() if policy in found}
    return {
        "cached": cached,
        "failed": [name.replace("_", " ") for name, passed in checks.items() if passed is False],
        "third": third,
        "policy": policy,
        "rates": rates,
        "closed": closed,
        "reached": sum(share >= GOAL for share in closed.values()),
        "near": NEAR,
        "faster": {kind: sum(any(place[name + kind] > 1 for name in names) for place in places) for kind in KINDS},
        "slowest": min((place[name] for place in places for name in names), default=None),
        "rows": {
            "hits": hits[~hits["per_layer"]],
            "closed": pd.DataFrame(
                {"capacity": capacity, "policy": name, "closed": share}
                for capacity, found in gaps.items()
                for name, share in found.items()
            ),
            "third": _at_a_third(hits, third),
            "decoding": cached.cells.assign(setting=cached.cells["policy"] + ", " + cached.cells["prefetch"]),
            "accuracies": _accuracies(cached),
            "precisions": [{**row, "loss": row["nll"] - precisions[0]["nll"]} for row in precisions],
            "places": places,
            "peers": _peers(peers["rows"]) if peers else [],
        },
        "by_prefetcher": {kind: [(name + kind, name, ".3f") for name in names] for kind in KINDS},
        "peers": peers,
        "missed": [goal for goal in peers["goals"] if goal["value"] < goal["goal"]] if peers else [],
    }


def _peers(rows: list[Record]) -> list[dict[str, Any]]:
    """Rows of the benchmark; one that could not be measured has a note in place of numbers."""
    numbers = ("hit_rate", "read_bytes", "cold", "ratio", "share", "bound_by")
    return [
        {
            **dict.fromkeys(numbers),
            **row,
            "note": row.get("note"),
            "limit": "none" if row["limit_bytes"] is None else f"{row['limit_bytes'] / 2**30:.1f} GiB",
            "speed": None if "note" in row else ratio(row["warm"], row["lowest"], row["highest"]),
        }
        for row in rows
    ]


def _places(cached: Cached, third: int) -> list[dict[str, Any]]:
    """For each machine and model, the simulated speed without prefetching, and with it relative to that.

    At a third of the experts. A prefetcher's own name stands for it where it is selective, with `_all` where it follows
    every prediction. `enough`: the least capacity with `NEAR` of the resident speed.
    """
    rows = []
    for (machine, model), own in cached.speeds.groupby(["machine", "model"], sort=False):
        held = own[own["capacity"] == third]
        none = held.loc[held["prefetch"] == "none", "ratio_to_resident"].iloc[0]
        ratios = {
            row["prefetch"] + ("" if row["selective"] else "_all"): row["ratio_to_resident"] / none
            for _, row in held[held["prefetch"] != "none"].iterrows()
        }
        enough = own.loc[own["ratio_to_resident"] >= NEAR, "capacity"].min()
        rows.append({"machine": machine, "model": model, "none": none, **ratios, "enough": enough})
    return rows


def _at_a_third(hits: "pd.DataFrame", third: int) -> list[dict[str, Any]]:
    """Hit rates of each policy with a share per layer, and of uniform routing under one budget and with shares."""
    own = hits[hits["capacity"] == third].set_index("policy")
    one, shares = own[~own["per_layer"]], own[own["per_layer"]]
    closed = {per_layer: gap_closed(hits, per_layer, third) for per_layer in (False, True)}
    return [
        {
            "policy": f"`{policy}`",
            "uniform": row["uniform_hit_rate"],
            "closed": closed[False].get(policy),
            "shares": shares["hit_rate"].get(policy),
            "uniform_shares": shares["uniform_hit_rate"].get(policy),
            "closed_shares": closed[True].get(policy),
        }
        for policy, row in one.iterrows()
    ]


def _accuracies(cached: Cached) -> list[dict[str, Any]]:
    """For each prefetcher, the share of needed experts that it predicted: while decoding, and on the trace."""
    speeds = cached.speeds[~cached.speeds["selective"]]
    decoding, trace = (frame.groupby("prefetch", sort=False)["accuracy"].first() for frame in (cached.cells, speeds))
    return [{"prefetch": name, "decoding": decoding.get(name), "trace": trace[name]} for name in trace.index]
