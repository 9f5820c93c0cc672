"""The DWR section of reports/measured.md: times, speeds and memory, in the sentences of templates/dwr_measured.md."""

from dynaroute.reporting.dwr.results import Measurements
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.pages import render


def section(measured: Measurements, cached: Record, moe: Record | None, reference: Record) -> str:
    """The section as Markdown.

    Args:
        measured: of the pipeline's own stages.
        cached: the summary of the cache benchmark.
        moe: the benchmark of the MoE layer, which the default pipeline does not run; None if there is no result.
        reference: the published timing.
    """
    import pandas as pd  # it is slow to import

    third, cells = cached["capacity_nearest_a_third"], measured.cells
    plain = (
        (cells["policy"] == cells["policy"].iloc[0]) & (cells["prefetch"] == "none") & (cells["page_cache"] == "warm")
    )
    return render(
        "dwr_measured.md",
        {
            "training": measured.training,
            "decoding": measured.cache,
            "cached": cached,
            "third": third,
            "policy": cells["policy"].iloc[0],
            "reference": reference,
            "moe": moe,
            "rows": {
                "capacities": [
                    {**measured.resident, "capacity": "all, resident"},
                    *cells[plain].sort_values("capacity").to_dict("records"),
                ],
                "cells": cells[(cells["capacity"] == third) & ~plain],
                "layers": pd.DataFrame([dict(row) for row in moe["rows"]]) if moe else None,
            },
        },
    )
