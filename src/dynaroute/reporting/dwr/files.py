"""The files of a run, and the checks that its stages made."""

from dynaroute.reporting.dwr.results import CHECKPOINTS, Results
from dynaroute.reporting.inputs import file_size
from dynaroute.reporting.tables import count, outcome, published, size, table


def export(results: Results) -> str:
    """Files of the expert store."""
    ours, theirs = results.export, results.reference["expert_store"]
    rows = [
        ["expert files", f"{ours['expert_files']}", f"{theirs['expert_files']}"],
        ["one of them", size(ours["expert_file_bytes"]), f"{theirs['expert_mib']:.1f} MiB"],
        ["backbone", size(ours["backbone_file_bytes"]), f"{theirs['backbone_mib']} MiB"],
        ["in all", size(ours["total_bytes"]), f"{theirs['total_mib']} MiB"],
    ]
    return (
        f"{table(['', 'this run', 'published (' + theirs['source'] + ')'], rows)}\n\n"
        "The backbone is everything but the experts: embeddings, attention, routers, norms and the output projection. "
        "All weights are 32-bit floats in safetensors files. A manifest holds the SHA-256 of each. The published sizes "
        "are written there as MB."
    )


def inventory(results: Results) -> str:
    """Checkpoints and their sizes."""
    theirs = results.reference["checkpoints"]
    rows = [
        [
            f"`{CHECKPOINTS}/best.safetensors`",
            size(file_size(CHECKPOINTS / "best.safetensors")),
            "weights with the lowest validation loss",
        ],
        [
            f"`{CHECKPOINTS}/last.safetensors`",
            size(file_size(CHECKPOINTS / "last.safetensors")),
            "all that a run goes on from: weights, optimizer, state",
        ],
        [
            "`data/dwr/expert_store/`",
            size(results.export["total_bytes"]),
            f"backbone and {count(results.export['expert_files'], 'expert')}, of the best checkpoint",
        ],
    ]
    return "\n\n".join(
        [
            table(["file", "size", "contents"], rows),
            published(
                f"{theirs['files']} checkpoints of {theirs['file_gb']:.1f} GB, one an epoch and a copy of the latest: "
                f"about {theirs['total_gb']} GB in all ({theirs['source']})."
            ),
        ]
    )


def properties(results: Results) -> str:
    """The outcome of every check that a stage made."""
    rows = [[outcome(passed), name.replace("_", " "), f"`{stage}`"] for stage, name, passed in checks(results)]
    return (
        f"{table(['outcome', 'property', 'checked by stage'], rows)}\n\n"
        "Each line is what a check of this run's stages found. Shapes, schedules, decay groups, exact resumption and "
        "the dispatch against a plain loop are checked by the test suite (`make test`)."
    )


def checks(results: Results) -> list[tuple[str, str, bool | None]]:
    """(stage, check, passed, or None if not measured)."""
    records = {
        "train_dwr": results.training.summary,
        "export_experts": results.export,
        "benchmark_cache": results.cache_summary,
    }
    return [(stage, name, passed) for stage, record in records.items() for name, passed in record["checks"].items()]
