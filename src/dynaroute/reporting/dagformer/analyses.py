"""What the analysis stages wrote, checked to be of the runs that the report shows."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.analysis.statistics import Verdict
from dynaroute.config import Settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dagformer.results import REPORTS, Results
from dynaroute.reporting.inputs import REMEDY, Record, check_same_run, read_checkpoint, read_csv, read_record

if TYPE_CHECKING:
    import pandas as pd  # at run time where tables are read: it is slow to import
    from torch import Tensor

ANALYSED = Path("data/analysis")
STATISTICS = Path("reports/statistics")
DIFFERENCE = ["difference", "low", "high", "n", "documents", "p_corrected"]
COLUMNS = {  # of the tables of numbers
    "gate_gradients": ["source", "target", "gates", "mean", "size", "sign_consistency", "helpful", "harmful"],
    "removal": ["fraction", "draws", *DIFFERENCE],
    "removal_layer_pairs": ["source", "target", *DIFFERENCE],
    "removal_heads": ["layer", "head", *DIFFERENCE],
}
COMPARISONS = [
    "mean",
    "low",
    "high",
    "n",
    "bootstrap_low",
    "bootstrap_high",
    "groups",
    "p",
    "detectable",
    "p_corrected",
    "p_error",
]


class Analyses(NamedTuple):
    """The analyses of the wirings of some variants, of single gates of the base, and of all differences."""

    topology: dict[str, Record]  # topology.json by variant
    sensitivity: Record  # sensitivity.json
    gradients: "pd.DataFrame"  # gate_gradients.csv: a row for each layer pair
    removal: "pd.DataFrame"  # removal.csv: a row for each order and fraction
    layer_pairs: "pd.DataFrame"  # removal_layer_pairs.csv
    heads: "pd.DataFrame"  # removal_heads.csv
    comparisons: "pd.DataFrame"  # comparisons.csv of the statistics
    seeds: Record  # seeds.json of the statistics

    def verdict(self, family: str, ours: str, mode: str, protocol: str) -> Verdict | None:
        """What a difference of a family shows, corrected for its other tests; None where it was not compared."""
        rows = self.comparisons
        keys = {"family": family, "ours": ours, "mode": mode, "protocol": protocol}
        for key, value in keys.items():
            rows = rows[rows[key] == value]
        return None if rows.empty else rows["verdict"].iloc[0]


def read_analyses(settings: Settings, results: Results) -> Analyses:
    """Reads all analyses.

    Raises:
        DynarouteError: a file is missing, damaged, or of another base or run than the results.
    """
    topology = {name: read_record(REPORTS / name / "topology.json") for name in settings.analysis.variants}
    for name, found in topology.items():
        check_same_run(results.variants[name].run["run"], found)
    sensitivity = read_sensitivity()
    if sensitivity["base"] != results.main.run["identity"]["base"]:
        raise DynarouteError(f"{sensitivity.path}: of another base than {results.main.run.path}: run dvc repro")
    comparisons = read_csv(STATISTICS / "comparisons.csv", COMPARISONS)
    known = {*results.variants, *(pool.name for pool in results.pools()), "baseline"}
    if not {*comparisons["ours"], *comparisons["theirs"]} <= known:
        raise DynarouteError(f"{STATISTICS / 'comparisons.csv'}: not of the variants of params.yaml: {REMEDY}")
    tables = (read_table(name) for name in ("gate_gradients", "removal", "removal_layer_pairs", "removal_heads"))
    return Analyses(topology, sensitivity, *tables, comparisons, read_record(STATISTICS / "seeds.json"))


def read_sensitivity() -> Record:
    """Reads the summary of the sensitivity analysis.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    return read_record(REPORTS / "sensitivity.json")


def read_table(name: str) -> "pd.DataFrame":
    """Reads one of the tables in COLUMNS.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    return read_csv(REPORTS / f"{name}.csv", COLUMNS[name])


class Wirings(NamedTuple):
    """Soft gates of one variant over the held-out texts, for figures."""

    variance: "Tensor"  # [N, N] over texts
    distances: "Tensor"  # of all pairs of texts
    same_text: "Tensor"  # of each text to its own prefix
    mean_by_source: "Tensor | None"  # [C, N, N]
    sources: list[str]
    num_heads: int


def read_wirings(name: str) -> Wirings:
    """Reads what figures show of a variant's wirings.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    tensors, state = read_checkpoint(ANALYSED / name / "wirings.safetensors")
    found = [tensors[key] for key in ("variance", "distances", "same_text")]
    return Wirings(*found, tensors.get("mean_by_source"), state["sources"], state["num_heads"])
