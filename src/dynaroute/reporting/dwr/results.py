"""The files that the DWR stages wrote, as consistent sets: a report must not mix two runs."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.config import Settings
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256
from dynaroute.reporting.inputs import REMEDY, Record, check_same_run, read_csv, read_record

if TYPE_CHECKING:
    import pandas as pd

REPORTS = Path("reports/dwr")  # what `dvc plots` shows
DATA = Path("data/dwr")  # everything else
REFERENCE = Path("reports/reference.yaml")


class Training(NamedTuple):
    """What the training recorded about itself."""

    run: Record  # its name, model configuration and identity
    summary: Record
    curve: "pd.DataFrame"  # a row for each validation
    router: "pd.DataFrame"  # a row for each expert, of the best checkpoint


class Corpus(NamedTuple):
    """What the model was trained on."""

    name: str
    place: Record  # what its source consists of: packages and versions, or files
    tokens: Record  # metadata of the token shards


class Cached(NamedTuple):
    """What a cache does with the experts of one run; nothing here is a measurement."""

    export: Record
    summary: Record  # of real decoding
    cells: "pd.DataFrame"  # a row for each capacity, policy and prefetcher
    simulation: Record
    hits: "pd.DataFrame"  # the replayed trace: a row for each capacity, policy and kind of budget
    speeds: "pd.DataFrame"  # the same on other machines: also for each machine, model and prefetcher


class Measurements(NamedTuple):
    """What was measured, on which machine."""

    training: Record
    cache: Record
    resident: "pd.Series"  # decoding without a cache
    cells: "pd.DataFrame"  # a row for each cell with one


def read_training() -> Training:
    """Reads what the training found.

    Raises:
        DynarouteError: a file is missing, damaged, of another run, or lacks what reports need.
    """
    run, summary = read_record(DATA / "train/run.json"), read_record(DATA / "train/summary.json")
    check_same_run(run["run"], summary)
    router = read_csv(REPORTS / "router.csv", ["layer", "expert", "gate_norm", "load"])
    layers, path = router["layer"].unique(), REPORTS / "training.csv"
    balance = [f"validation_balance_layer{layer}" for layer in layers]
    curve = read_csv(path, ["step", "epoch", "tokens", "lr", "validation_loss", *balance])
    trained = curve[curve["step"] > 0]
    balance = [f"train_balance_loss_layer{layer}" for layer in layers]
    for name in ["train_loss", "train_dropped_share", "train_gradient_norm", *balance]:
        if trained.empty or name not in trained or trained[name].isna().any():
            raise DynarouteError(f"{path}: {name!r} must hold a number in every row after step 0: {REMEDY}")
    return Training(run, summary, curve, router)


def read_runs(settings: Settings) -> list[Record]:
    """Reads what every run beside the main model found, the reference first.

    Raises:
        DynarouteError: a file is missing, damaged or of other settings.
    """
    runs = []
    for name in sorted(settings.dwr_runs, key=lambda name: name != "reference"):
        run = read_record(DATA / f"run_results/{name}.json")
        if run["settings"] != settings.dwr_run(name).model_dump():
            raise DynarouteError(f"{run.path}: of other settings than dwr_runs.{name}: run dvc repro")
        runs.append(run)
    return runs


def read_corpus(run: Record) -> Corpus:
    """Reads what is known of the corpus of a run.

    Raises:
        DynarouteError: a file is missing or damaged, or the tokens are not those of that run.
    """
    name = run["identity"]["dwr"]["corpus"]
    path = Path("data/tokens") / name / "metadata.json"
    tokens = read_record(path)
    if sha256(path) != run["identity"]["tokens"]:
        raise DynarouteError(f"{path}: not the tokens that run {run['run']} was trained on: run dvc repro")
    return Corpus(name, read_record(Path("data/inputs") / f"corpora.{name}.source.json"), tokens)


def read_cached() -> Cached:
    """Reads what the export and the caches found.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    export, summary, simulation = (
        read_record(DATA / name / "summary.json") for name in ("export", "cache", "simulation")
    )
    check_same_run(export["run"], summary, simulation)
    cells = read_csv(DATA / "cache/cells.csv", ["capacity", "decode_hit_rate"], names=["policy", "prefetch"])
    names = ["machine", "model", "policy", "prefetch"]
    speeds = read_csv(DATA / "simulation/speed.csv", ["capacity", "hit_rate", "ratio_to_resident"], names=names)
    return Cached(export, summary, cells, simulation, read_hits(), speeds)


def read_hits() -> "pd.DataFrame":
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
    folder = DATA / "measured"
    training, cache = read_record(folder / "training.json"), read_record(folder / "cache/summary.json")
    check_same_run(run, cache)
    path = folder / "cache/cells.csv"
    ratios = ["ratio_to_resident", "ratio_lowest", "ratio_highest"]
    reads = [f"bytes_{name}" for name in ("read", "read_ahead", "useful", "late", "wasted")]
    rows = read_csv(path, ["tokens_per_second", *ratios, "prefill_seconds", "wait_share", *reads])
    for name in ("capacity", "policy", "prefetch", "page_cache"):
        if name not in rows or rows[name].notna().tolist() != [False, *[True] * (len(rows) - 1)]:
            raise DynarouteError(f"{path}: {name!r} must be empty in the first row, of the resident model: {REMEDY}")
    return Measurements(training, cache, rows.iloc[0], rows.iloc[1:].astype({"capacity": int}))
