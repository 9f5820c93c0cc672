"""The DAGFormer section of reports/measured.md: times and memory. The sentences are in templates/."""

from statistics import median
from typing import Any, NamedTuple

from dynaroute.reporting.dagformer.results import DATA, MAIN, Results
from dynaroute.reporting.inputs import Record, read_benchmark, read_record
from dynaroute.reporting.pages import render


class Measurements(NamedTuple):
    """What was measured."""

    base: Record
    planted: Record | None
    variants: dict[str, Record]  # by name
    benchmark: Record | None  # of the DAG forward, by a target of its own; None if it was not run


def read_measurements(results: Results) -> Measurements:
    """Reads what was measured on the runs of these results.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    variants = {name: read_record(DATA / "measured" / f"{name}.json") for name in results.variants}
    planted = read_record(DATA / "measured/planted.json") if results.planted else None
    return Measurements(read_record(DATA / "measured/base.json"), planted, variants, read_benchmark("dag"))


def section(results: Results, measured: Measurements, reference: Record) -> str:
    """The section as Markdown; `reference` is the published timing."""
    curve, ours = results.main.curve, measured.variants[MAIN]
    every = curve["step"].iloc[-1] / (len(curve) - 1)  # steps between validations
    return render(
        "dagformer_measured.md",
        {
            "base": measured.base,
            "planted": measured.planted,
            "ours": ours,
            "reference": reference,
            "knobs": results.main.knobs,
            "setup": results.setup,
            "every": every,
            "evaluated": ours["seconds_per_step"] + ours["validation_seconds"] / every,
            "variants": len(measured.variants),
            "per_step": sorted(timing["seconds_per_step"] for timing in measured.variants.values()),
            "median": median(timing["seconds_per_step"] for timing in measured.variants.values()),
            "memory": max(timing["peak_memory_bytes"] for timing in measured.variants.values()),
            "benchmark": measured.benchmark,
            "rows": [row for result in (measured.benchmark or {"results": []})["results"] for row in _size(result)],
        },
    )


def _size(result: Record) -> list[dict[str, Any]]:
    """The benchmark at one size: a row for each candidate; none where the size was too large."""
    size = result["size"]
    heads = f"H{size['H']}"
    if size.get("key_value_heads", size["H"]) != size["H"]:
        heads += f" ({size['key_value_heads']} of keys and values)"
    rows = []
    for name, candidate in result["candidates"].items():
        row = {"size": f"L{size['L']} {heads} D{size['D']} B{size['B']} T{size['T']}", "candidate": name}
        for part in ("forward", "forward_backward"):
            low, high = candidate[part]["ratio_to_dense_quartiles"]
            row[part] = candidate[part]["milliseconds"] / 1000
            row[f"{part}_ratio"] = f"{candidate[part]['ratio_to_dense']:.2f} ({low:.2f}–{high:.2f})"
        peak = candidate.get("forward_backward_peak_mib")
        rows.append(row | {"memory": None if peak is None else peak * 2**20, "bound": result["bounds"]["flop_bound"]})
    return rows
