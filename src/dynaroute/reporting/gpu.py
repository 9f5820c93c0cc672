"""reports/gpu.md: the published sizes on one GPU. A stage that has not run yet is named instead of its rows."""

import math
from pathlib import Path
from typing import Any

from dynaroute.reporting.inputs import Record, check_same_run, read_record
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import Column, perplexity, size, tabulate

FILES = {
    "training": "data/dwr/train/summary", "timing": "data/dwr/measured/training", "export": "data/dwr/export/summary",
    "moe": "reports/benchmarks/moe", "cache": "reports/benchmarks/gpu_cache", "dag": "reports/benchmarks/dag",
    "step": "reports/benchmarks/dagformer_step",
}  # fmt: skip
PUBLISHED_CARD = "NVIDIA A40"
MODELS: list[Column] = [
    ("model", "model"), ("parameters", "parameters"), ("milliseconds", "ms a step", ",.2f"),
    ("tokens_per_second", "tokens/s", ",.0f"), ("utilisation", "model FLOPs utilisation", ".1%"),
    ("peak_memory_bytes", "peak memory", size), ("failed", "failed"),
]  # fmt: skip
CELLS: list[Column] = [
    ("experts_in", "experts in"), ("policy", "policy"), ("prefetch", "prefetching"),
    ("tokens_per_second", "tokens/s", ",.0f"), ("ratio_to_resident", "to resident", ".3f"),
    ("hit_rate", "hit rate", ".3f"), ("reads_per_token", "reads a token", ".2f"),
    ("stall_ms_per_token", "stall a token, ms", ".3f"),
]  # fmt: skip
SIZES: list[Column] = [
    ("shape", "layers, heads, width, batch, tokens"), ("name", "forward"), ("forward", "ms", ",.2f"),
    ("forward_to_dense", "to dense", ".2f"), ("both", "ms, with backward", ",.2f"),
    ("both_to_dense", "to dense", ".2f"), ("peak", "peak memory, MiB", ",.0f"), ("failed", "failed"),
]  # fmt: skip
GOALS: list[Column] = [("goal", "goal"), ("bound", "bound"), ("value", "value", ",.3g"), ("verdict", "verdict")]


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
    values = found | {"device": device, "published": published, "published_card": PUBLISHED_CARD}
    values["goals"] = tabulate(goals(found, device), GOALS)
    values["machines"] = {name: record["machine"] for name, record in found.items() if record and "machine" in record}
    if found["training"]:
        values["perplexity"] = perplexity(found["training"]["best_validation_loss"])
    if found["moe"]:
        values["models"] = tabulate(models(found["moe"], cards.get(found["moe"]["machine"]["processor"])), MODELS)
    if found["cache"]:
        values["cells"] = tabulate(at_a_third(found["cache"]), CELLS)
    if found["dag"]:
        values["sizes"] = tabulate([row for result in found["dag"]["results"] for row in sizes(result)], SIZES)
    if found["step"]:
        values["card"] = cards.get(found["step"]["machine"]["processor"])
        values["other_card"] = cards[PUBLISHED_CARD]
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


def models(moe: Record, card: Record | None) -> list[dict[str, Any]]:
    """A row for each trained model; utilisation of the card's published peak, if it is known."""
    training, empty = moe["training"], dict.fromkeys(key for key, *_ in MODELS)
    flops = training["flops_per_token"] / (card["bf16_tflop_per_second"] * 1e12) if card else float("nan")
    used = {name: model.get("tokens_per_second", float("nan")) * flops for name, model in training["models"].items()}
    return [empty | {"model": name, "utilisation": used[name]} | model for name, model in training["models"].items()]


def at_a_third(cache: Record) -> list[Record]:
    """The rows at the capacity nearest to a third of the experts."""
    return [row for row in cache["rows"] if row["capacity"] == cache["capacity_nearest_a_third"]]


def sizes(result: Record) -> list[dict[str, Any]]:
    """A row for each way of a forward pass at one size; one that did not fit into memory says so."""
    shape = ", ".join(f"{result['size'][key]:,}" for key in "LHDBT")
    empty = dict.fromkeys(key for key, *_ in SIZES) | {"shape": shape}
    rows = [
        empty | {"name": name, "forward": row["forward"]["milliseconds"], "peak": row.get("forward_backward_peak_mib"),
                 "forward_to_dense": row["forward"]["ratio_to_dense"], "both": row["forward_backward"]["milliseconds"],
                 "both_to_dense": row["forward_backward"]["ratio_to_dense"]}
        for name, row in result["candidates"].items()
    ]  # fmt: skip
    return rows + [empty | {"name": name, "failed": reason} for name, reason in result["failed"].items()]
