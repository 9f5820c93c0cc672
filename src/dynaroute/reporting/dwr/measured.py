"""The DWR section of reports/measured.md: times, speeds and memory, in the sentences of templates/dwr_measured.md."""

from dynaroute.reporting.dwr.results import DATA
from dynaroute.reporting.inputs import Record, read_csv, read_record
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import ratio


def section(cached: Record, moe: Record | None, reference: Record) -> str:
    """The section as Markdown.

    Args:
        cached: the summary of the cache benchmark.
        moe: the benchmark of the MoE layer, which the default pipeline does not run; None if there is no result.
        reference: the published timing.

    Raises:
        DynarouteError: a measurement is missing or damaged.
    """
    import pandas as pd  # it is slow to import

    rows = read_csv(DATA / "measured/cache/cells.csv", "capacity", "policy", "prefetch", "page_cache", "ratio_lowest")
    columns = rows["ratio_to_resident"], rows["ratio_lowest"], rows["ratio_highest"]
    rows["ratio"] = [ratio(*row) for row in zip(*columns, strict=True)]
    resident, cells = rows.iloc[0], rows.iloc[1:].astype({"capacity": int})  # decoding without a cache comes first
    third, policy = cached["capacity_nearest_a_third"], cells["policy"].iloc[0]
    plain = (cells["policy"] == policy) & (cells["prefetch"] == "none") & (cells["page_cache"] == "warm")
    return render(
        "dwr_measured.md",
        {
            "training": read_record(DATA / "measured/training.json"),
            "decoding": read_record(DATA / "measured/cache/summary.json"),
            "cached": cached,
            "third": third,
            "policy": policy,
            "reference": reference,
            "moe": moe,
            "rows": {
                "capacities": [
                    {**resident, "capacity": "all, resident"},
                    *cells[plain].sort_values("capacity").to_dict("records"),
                ],
                "cells": cells[(cells["capacity"] == third) & ~plain],
                "layers": pd.DataFrame([dict(row) for row in moe["rows"]]) if moe else None,
            },
        },
    )
