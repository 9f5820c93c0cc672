"""The DAGFormer section of reports/measured.md: times and memory. The sentences stand in templates/."""

from pathlib import Path
from typing import Any, NamedTuple

from dynaroute.reporting.dagformer.results import DATA, MAIN, Results
from dynaroute.reporting.inputs import Record, changed_since_measured, read_record
from dynaroute.reporting.pages import render

BENCHMARK = Path("reports/benchmarks/dag.json")


class Measurements(NamedTuple):
    """What was measured, on which machine."""

    base: Record
    variants: dict[str, Record]  # by name
    benchmark: Record | None  # of the DAG forward, by a target of its own; None if it was not run


def read_measurements(results: Results) -> Measurements:
    """Reads what was measured on the runs of these results.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    variants = {name: read_record(DATA / "measured" / f"{name}.json") for name in results.variants}
    benchmark = read_record(BENCHMARK) if BENCHMARK.exists() else None
    return Measurements(read_record(DATA / "measured/base.json"), variants, benchmark)


def section(results: Results, measured: Measurements, reference: Record) -> str:
    """The section as Markdown; `reference` is the published timing."""
    curve, ours = results.main.curve, measured.variants[MAIN]
    machines: dict[str, list[str]] = {}  # what ran on each
    for name, timing in {"base": measured.base, **measured.variants}.items():
        machines.setdefault(_machine(timing), []).append(name)
    every = curve["step"].iloc[-1] / (len(curve) - 1)  # steps between validations
    return render(
        "dagformer_measured.md",
        {
            "machines": [
                {"ran": "all" if len(machines) == 1 else ", ".join(ran), "machine": machine}
                for machine, ran in machines.items()
            ],
            "base": measured.base,
            "ours": ours,
            "reference": reference,
            "knobs": results.main.knobs,
            "setup": results.setup,
            "every": every,
            "evaluated": ours["seconds_per_step"] + ours["validation_seconds"] / every,
            "variants": [{"id": name, **timing} for name, timing in measured.variants.items()],
            "benchmark": measured.benchmark,
            "benchmark_machine": None if measured.benchmark is None else _machine(measured.benchmark),
            "sizes": [] if measured.benchmark is None else [
                _size(result) for result in measured.benchmark["results"] if result["candidates"]  # others: too large
            ],
            "changed": changed_since_measured("benchmark_dag"),
        },
    )  # fmt: skip


def _machine(timing: Record) -> str:
    return ", ".join(f"{part} {value}" for part, value in timing["machine"].items())


def _size(result: Record) -> dict[str, Any]:
    """The benchmark at one size: a row for each candidate, and its bounds."""
    rows = []
    for name, candidate in result["candidates"].items():
        row: dict[str, Any] = {"candidate": name, "memory": None}
        for part in ("forward", "forward_backward"):
            low, high = candidate[part]["ratio_to_dense_quartiles"]
            row[part] = candidate[part]["milliseconds"] / 1000
            row[f"{part}_ratio"] = f"{candidate[part]['ratio_to_dense']:.2f} ({low:.2f}–{high:.2f})"
        if "forward_backward_peak_mib" in candidate:
            row["memory"] = candidate["forward_backward_peak_mib"] * 2**20
        rows.append(row)
    return {"rows": rows, "difference": result["largest_difference_to_reference"], **result}
