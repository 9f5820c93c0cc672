"""Writes the page of what was measured on a GPU. A stage that has not run yet is named in place of its rows.

    python benchmarks/report_gpu.py    (in gpu/, as `make gpu` does)

Reads   cards.yaml, data/dwr, reports/benchmarks, ../reports/reference.yaml
Writes  ../reports/gpu.md
"""

import math
from pathlib import Path
from typing import Any

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.inputs import Record, check_same_run, read_record
from dynaroute.reporting.pages import render

FILES = {
    "training": "data/dwr/train/summary", "timing": "data/dwr/measured/training", "export": "data/dwr/export/summary",
    "moe": "reports/benchmarks/moe", "cache": "reports/benchmarks/gpu_cache", "dag": "reports/benchmarks/dag",
    "step": "reports/benchmarks/dagformer_step",
}  # fmt: skip
PUBLISHED_CARD = "NVIDIA A40"


def main(settings: Settings) -> None:
    """Writes the page."""
    write_text("../reports/gpu.md", page(settings.device))


def page(device: str) -> str:
    """The page as Markdown, of what there is in gpu/; with the device cpu it says that no figure is a GPU's.

    Raises:
        DynarouteError: a file is damaged or of another run, or a published number is missing.
    """
    paths = {name: Path(f"{file}.json") for name, file in FILES.items()}
    found: dict[str, Any] = {name: read_record(path) if path.exists() else None for name, path in paths.items()}
    if found["training"]:
        check_same_run(found["training"]["run"], *(found[name] for name in ("export", "cache") if found[name]))
    cards, published = read_record("cards.yaml"), read_record("../reports/reference.yaml")["dagformer"]["timing"]
    values = found | {
        "device": device,
        "published": published,
        "published_card": PUBLISHED_CARD,
        "goals": goals(found, device),
        "machines": {name: record["machine"] for name, record in found.items() if record and "machine" in record},
        "cells": at_a_third(found["cache"]) if found["cache"] else [],
        "cards": {name: cards.get(found[name]["machine"]["processor"]) for name in ("moe", "step") if found[name]},
        "other_card": cards[PUBLISHED_CARD],
    }
    return render("gpu.md", values)


def goals(found: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """A row for each goal. Of a model and its compiled form the faster counts, of cache settings the fastest."""
    values: dict[str, float] = {}
    if found["moe"]:
        trained = found["moe"]["training"]["models"].items()
        speeds = {name: model["tokens_per_second"] for name, model in trained if "failed" not in model}
        values["training"] = _fastest(speeds, "dynaroute", max) / _fastest(speeds, "dense", max)
    if found["cache"]:
        values["resident"] = found["cache"]["resident_tokens_per_second"]
        values["cached"] = max(row["ratio_to_resident"] for row in at_a_third(found["cache"]))
    if found["dag"]:
        measured = [result for result in found["dag"]["results"] if result["candidates"]]
        times = [{name: row["forward_backward"]["milliseconds"] for name, row in result["candidates"].items()}
                 for result in measured]  # fmt: skip
        values["dag"] = max(_fastest(one, "ours", min) / _fastest(one, "dense", min) for one in times)
        values["bytes"] = min(result["fraction_of_byte_bound"] for result in measured)
    return [
        {"goal": goal, "bound": f"at {'least' if least else 'most'} {bound:g}", "value": values.get(key),
         "verdict": _verdict(values.get(key), bound, least) if device == "cuda" else None}
        for key, goal, least, bound in (
            ("training", "DWR training tokens/s, to a dense model of equal active parameters", True, 0.6),
            ("resident", "Resident decoding at batch 1, tokens/s", True, 300),
            ("cached", "Decoding with a third of the experts, to resident", True, 0.7),
            ("dag", "DAG forward and backward, to dense, at the worst size", False, 2.0),
            ("bytes", "Share of the byte bound reached, at the worst size", True, 0.6),
        )
    ]  # fmt: skip


def _verdict(value: float | None, bound: float, least: bool) -> str:
    if value is None or math.isnan(value):  # nan: all of one kind failed
        return "not measured"
    return "reached" if (value >= bound if least else value <= bound) else "**not reached**"


def _fastest(values: dict[str, float], name: str, best: Any) -> float:
    return best((values[key] for key in (name, f"{name}_compiled") if key in values), default=math.nan)


def at_a_third(cache: Record) -> list[Record]:
    """The rows at the capacity nearest to a third of the experts."""
    return [row for row in cache["rows"] if row["capacity"] == cache["capacity_nearest_a_third"]]


if __name__ == "__main__":
    run(main, __doc__)
