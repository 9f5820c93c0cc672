"""The files that the DWR stages wrote. DVC sees to it that all of them are of one run."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.config import Settings
from dynaroute.reporting.inputs import Record, read_csv, read_record

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
    speeds: "pd.DataFrame"  # for each capacity, machine, model and prefetcher, selective or not


def read_training() -> Training:
    """Reads what the training found. Raises DynarouteError if a file is missing or damaged."""
    run, summary = read_record(DATA / "train/run.json"), read_record(DATA / "train/summary.json")
    curve = read_csv(REPORTS / "training.csv", "step", "validation_loss", "train_loss")
    return Training(run, summary, curve, read_csv(REPORTS / "router.csv", "layer", "expert", "gate_norm", "load"))


def read_runs(settings: Settings) -> list[Record]:
    """What the runs beside the main model found, the reference first. Raises DynarouteError if one is missing."""
    names = sorted(settings.dwr_runs, key=lambda name: name != "reference")
    return [read_record(DATA / f"run_results/{name}.json") for name in names]


def read_corpus(run: Record) -> Corpus:
    """Reads what is known of the corpus of a run. Raises DynarouteError if a file is missing or damaged."""
    name = run["identity"]["dwr"]["corpus"]
    tokens = read_record(Path("data/tokens") / name / "metadata.json")
    return Corpus(name, read_record(Path("data/inputs") / f"corpora.{name}.source.json"), tokens)


def read_cached() -> Cached:
    """Reads what the export and the caches found. Raises DynarouteError if a file is missing or damaged."""
    export, summary, simulation = (
        read_record(DATA / name / "summary.json") for name in ("export", "cache", "simulation")
    )
    cells = read_csv(DATA / "cache/cells.csv", "capacity", "policy", "prefetch", "decode_hit_rate")
    speeds = read_csv(DATA / "simulation/speed.csv", "capacity", "prefetch", "selective", "ratio_to_resident")
    return Cached(export, summary, cells, simulation, read_hits(), speeds)


def read_hits() -> "pd.DataFrame":
    """Reads the hit rates of the replayed trace. Raises DynarouteError if a file is missing or damaged."""
    return read_csv(REPORTS / "simulated_hits.csv", "capacity", "policy", "per_layer", "hit_rate", "uniform_hit_rate")


def read_locality(size: str, reference: str | None = None) -> "pd.DataFrame | None":
    """Reads the benchmark of training for the cache, a row for each setting and routing; None if there is none.

    With the run `reference`, results beside another reference are none either. Raises DynarouteError if it is damaged.
    """
    path = Path(f"reports/benchmarks/locality_{size}.csv")
    if not path.exists():
        return None
    table = read_csv(path, "setting", "routing", "run", "perplexity", "smallest_load", "lru_third")
    return table if reference in (None, table["run"][0]) else None
