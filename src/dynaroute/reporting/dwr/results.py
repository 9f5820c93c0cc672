"""The files that the DWR stages wrote, as one consistent set: a report must not mix two runs."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256
from dynaroute.reporting.inputs import REMEDY, Record, check_same_run, read_csv, read_record

if TYPE_CHECKING:
    import pandas as pd

REPORTS = Path("reports/dwr")
CHECKPOINTS = Path("data/dwr/train")
REFERENCE = Path("reports/reference.yaml")
MOE = Path("reports/benchmarks/moe.json")


class Training(NamedTuple):
    """What the training recorded about itself."""

    summary: Record  # training.json
    curve: "pd.DataFrame"  # training.csv: a row for each validation
    router: "pd.DataFrame"  # router.csv: a row for each expert, of the best checkpoint


class Corpus(NamedTuple):
    """What the model was trained on."""

    name: str
    place: Record  # what its source consists of: packages and versions, or files
    tokens: Record  # metadata.json of the token shards


class Results(NamedTuple):
    """Everything that the report is made from but for measurements; all of one run."""

    run: Record  # run.json
    training: Training
    corpus: Corpus
    export: Record  # export.json
    cache: "pd.DataFrame"  # cache.csv: a row for each cell
    cache_summary: Record  # cache.json
    simulation: Record  # simulation.json: hit rates of a longer text, replayed
    reference: Record  # the published numbers


class Measurements(NamedTuple):
    """What was measured, on which machine."""

    training: Record  # training_timing.json
    cache: Record  # cache_timing.json
    resident: "pd.Series"  # the first row of cache_timing.csv: no cache
    cells: "pd.DataFrame"  # the others: a row for each cell
    moe: Record | None  # of the MoE layer, by a target of its own; None if it was not run


def num_experts(run: Record) -> int:
    """Experts of all layers together, of a run with its run.json."""
    return run["config"]["num_layers"] * run["config"]["num_experts"]


def read_results() -> Results:
    """Reads everything but measurements.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    run, training = read_record(CHECKPOINTS / "run.json"), read_training()
    export, cache_summary = read_record(REPORTS / "export.json"), read_record(REPORTS / "cache.json")
    simulation = read_record(REPORTS / "simulation.json")
    check_same_run(run["run"], training.summary, export, cache_summary, simulation)
    reference = read_record(REFERENCE)["dwr"]
    return Results(run, training, read_corpus(run), export, read_cache(), cache_summary, simulation, reference)


def read_cache() -> "pd.DataFrame":
    """Reads what the cache did in every cell of the benchmark.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    rates = ["prefill_hit_rate", "decode_hit_rate"]
    counts = ["misses", "evictions", "prefetched", "prefetch_evictions"]
    return read_csv(REPORTS / "cache.csv", ["capacity", *rates, *counts], names=["policy", "prefetch"])


def read_simulated_hits() -> "pd.DataFrame":
    """Reads the hit rates of the replayed trace.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    columns = ["capacity", "per_layer", "hit_rate", "uniform_hit_rate"]
    return read_csv(REPORTS / "simulated_hits.csv", columns, names=["policy"])


def read_measurements(run: str) -> Measurements:
    """Reads what was measured on a run.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    cache = read_record(REPORTS / "cache_timing.json")
    check_same_run(run, cache)
    moe = read_record(MOE) if MOE.exists() else None
    return Measurements(read_record(REPORTS / "training_timing.json"), cache, *read_speeds(), moe)


def read_speeds() -> "tuple[pd.Series, pd.DataFrame]":
    """Reads speed, reads and memory of the resident model, and of every cell with a cache.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    path = REPORTS / "cache_timing.csv"
    ratios = ["ratio_to_resident", "ratio_lowest", "ratio_highest"]
    reads = [f"bytes_{name}" for name in ("read", "read_ahead", "useful", "late", "wasted")]
    rows = read_csv(path, ["tokens_per_second", *ratios, "prefill_seconds", "wait_share", *reads])
    for name in ("capacity", "policy", "prefetch", "page_cache"):
        if name not in rows or rows[name].notna().tolist() != [False, *[True] * (len(rows) - 1)]:
            raise DynarouteError(f"{path}: {name!r} must be empty in the first row, of the resident model: {REMEDY}")
    return rows.iloc[0], rows.iloc[1:].astype({"capacity": int})


def read_training() -> Training:
    """Reads summary, curve and router statistics.

    Raises:
        DynarouteError: a file is missing, damaged, or lacks what reports need.
    """
    router = read_csv(REPORTS / "router.csv", ["layer", "expert", "gate_norm", "load"])
    balance = [f"validation_balance_layer{layer}" for layer in router["layer"].unique()]
    path = REPORTS / "training.csv"
    curve = read_csv(path, ["step", "epoch", "tokens", "lr", "validation_loss", *balance])
    trained = curve[curve["step"] > 0]
    balance = [f"train_balance_loss_layer{layer}" for layer in router["layer"].unique()]
    for name in ["train_loss", "train_dropped_share", "train_gradient_norm", *balance]:
        if trained.empty or name not in trained or trained[name].isna().any():
            raise DynarouteError(f"{path}: {name!r} must hold a number in every row after step 0: {REMEDY}")
    return Training(read_record(REPORTS / "training.json"), curve, router)


def read_corpus(run: Record) -> Corpus:
    """Reads what is known of the corpus of a run, given its run.json.

    Raises:
        DynarouteError: a file is missing or damaged, or the tokens are not those of that run.
    """
    name = run["identity"]["dwr"]["corpus"]
    path = Path("data/tokens") / name / "metadata.json"
    tokens = read_record(path)
    if sha256(path) != run["identity"]["tokens"]:
        raise DynarouteError(f"{path}: not the tokens that run {run['run']} was trained on: run dvc repro")
    return Corpus(name, read_record(Path("data/raw") / f"{name}.source.json"), tokens)
