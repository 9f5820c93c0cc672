"""The DAGFormer section of reports/measured.md: times and memory. The sentences are in templates/."""

from statistics import median
from typing import Any

from dynaroute.reporting.dagformer.results import DATA, MAIN, Results
from dynaroute.reporting.inputs import Record, read_benchmark, read_record
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import ratio


def section(results: Results, reference: Record) -> str:
    """The section as Markdown; `reference` is the published timing.

    Raises:
        DynarouteError: a measurement is missing or damaged.
    """
    variants = {name: read_record(DATA / f"measured/{name}.json") for name in results.variants}
    curve, ours, benchmark = results.main.curve, variants[MAIN], read_benchmark("dag")
    every = curve["step"].iloc[-1] / (len(curve) - 1)  # steps between validations
    per_step = sorted(timing["seconds_per_step"] for timing in variants.values())
    return render(
        "dagformer_measured.md",
        {
            "base": read_record(DATA / "measured/base.json"),
            "planted": read_record(DATA / "measured/planted.json") if results.planted else None,
            "ours": ours,
            "reference": reference,
            "knobs": results.main.knobs,
            "setup": results.setup,
            "every": every,
            "evaluated": ours["seconds_per_step"] + ours["validation_seconds"] / every,
            "variants": len(variants),
            "per_step": per_step,
            "median": median(per_step),
            "memory": max(timing["peak_memory_bytes"] for timing in variants.values()),
            "benchmark": benchmark,
            "rows": [row for result in (benchmark or {"results": []})["results"] for row in _size(result)],
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
            row[f"{part}_ratio"] = ratio(
                candidate[part]["ratio_to_dense"], *candidate[part]["ratio_to_dense_quartiles"]
            )
        row["seconds"] = candidate["forward_backward"]["milliseconds"] / 1000
        peak = candidate.get("forward_backward_peak_mib")
        rows.append(row | {"memory": None if peak is None else peak * 2**20, "bound": result["bounds"]["flop_bound"]})
    return rows
