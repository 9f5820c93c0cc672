"""The DWR section of reports/measured.md: times, speeds and memory, in the sentences of templates/dwr_measured.md."""

from dynaroute.reporting.dwr.results import Measurements
from dynaroute.reporting.inputs import Record, changed_since_measured
from dynaroute.reporting.pages import render


def section(measured: Measurements, cached: Record, moe: Record | None, reference: Record) -> str:
    """The section as Markdown.

    Args:
        measured: of the pipeline's own stages.
        cached: the summary of the cache benchmark.
        moe: the benchmark of the MoE layer, which the default pipeline does not run; None if there is no result.
        reference: the published timing.
    """
    third, cells = cached["capacity_nearest_a_third"], measured.cells
    machines = {"training": measured.training["machine"], "decoding": measured.cache["machine"]}
    parts = dict.fromkeys(part for machine in machines.values() for part in machine)
    plain = cells[
        (cells["policy"] == cells["policy"].iloc[0]) & (cells["prefetch"] == "none") & (cells["page_cache"] == "warm")
    ].sort_values("capacity")
    return render(
        "dwr_measured.md",
        {
            "training": measured.training,
            "decoding": measured.cache,
            "cached": cached,
            "third": third,
            "policy": cells["policy"].iloc[0],
            "ordered": bool((plain["ratio_lowest"].iloc[1:].to_numpy() > plain["ratio_highest"].iloc[:-1]).all()),
            "reference": reference,
            "moe": moe,
            "changed": changed_since_measured("benchmark_moe"),
            "rows": {
                "machines": [
                    {"part": part, **{name: machine.get(part) for name, machine in machines.items()}} for part in parts
                ],
                "capacities": [{**measured.resident, "capacity": "all, resident"}, *plain.to_dict("records")],
                "cells": cells[cells["capacity"] == third],
            },
        },
    )
