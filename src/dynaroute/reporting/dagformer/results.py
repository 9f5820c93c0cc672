"""The files that the DAGFormer stages wrote. DVC sees to it that all of them are of one run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynaroute.config import Settings
from dynaroute.config.dagformer import BASES
from dynaroute.errors import DynarouteError
from dynaroute.reporting.inputs import Record, read_csv, read_record

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd  # at run time where tables are read: it is slow to import

DATA = Path("data/dagformer")
REPORTS = Path("reports/dagformer")
MAIN, CONTROL = "P1", "C1"  # every variant is P1 with overrides; C1 has one wiring for all texts
JOINT = ("J1", "J0")  # the base trained jointly with the predictor, and trained on with all gates held open
# What may differ between a variant and the same one at another budget.
BUDGET = {"steps", "validate_every", "checkpoint_every", "micro_batch_size"}


class Variant(NamedTuple):
    """One trained and evaluated variant."""

    name: str
    run: Record  # run.json
    training: Record  # training.json
    curve: "pd.DataFrame"  # training.csv: a row for each validation
    evaluation: Record  # nll.json
    windows: "pd.DataFrame"  # nll.csv: a row for each protocol and window

    @property
    def knobs(self) -> Record:
        """All knobs of the variant."""
        return self.run["knobs"]

    def changes(self, other: "Variant") -> dict[str, Any]:
        """The knobs in which it differs from another one, with its own values."""
        return {key: value for key, value in self.knobs.items() if value != other.knobs[key]}


class Results(NamedTuple):
    """Everything that training and evaluation left."""

    variants: dict[str, Variant]  # on the base itself, in the order of params.yaml
    planted: dict[str, Variant]  # on the planted base
    base: Record  # base.json
    setup: Record  # what all variants share: `dagformer` of params.yaml

    @property
    def main(self) -> Variant:
        """The variant that the others are compared with."""
        return self.variants[MAIN]

    @property
    def documents(self) -> "np.ndarray":
        """The document of each held-out window, [n]."""
        windows = self.main.windows
        return windows.loc[windows["protocol"] == "window", "document"].to_numpy()

    def nll(self, name: str, mode: str, protocol: str) -> "np.ndarray":
        """NLL of every held-out window in nats per token, [n]; the mode may be baseline as well."""
        windows = (self.variants | self.planted)[name].windows
        return windows.loc[windows["protocol"] == protocol, f"nll_{mode}"].to_numpy()

    def seeds(self, name: str = MAIN) -> dict[str, int]:
        """A variant with each of its seeds, by name, at the budget at which most were run."""
        budgets: dict[int, dict[str, int]] = {}
        for other in self.variants.values():
            if set(other.changes(self.variants[name])) <= BUDGET | {"seed"}:
                budgets.setdefault(other.knobs["steps"], {})[other.name] = other.knobs["seed"]
        return max(budgets.values(), key=len)

    def reference(self, variant: Variant) -> str | None:
        """What a variant is compared with: J0 for J1, else the main variant at its budget; None if there is none."""
        if variant.name in JOINT:
            return JOINT[1] if variant.name == JOINT[0] and JOINT[1] in self.variants else None
        for other in self.variants.values():
            if set(other.changes(self.main)) <= BUDGET and other.knobs["steps"] == variant.knobs["steps"]:
                return None if other is variant else other.name
        return None


class Comparisons(NamedTuple):
    """What `compare_variants` computed of those results."""

    primary: list[Record]
    seeds: Record
    control_seeds: Record
    differences: "pd.DataFrame"  # variants.csv, indexed by variant, protocol and mode

    @property
    def hard(self) -> "pd.DataFrame":
        """Of hard mode by the window protocol, indexed by variant."""
        return self.differences.xs(("window", "hard"), level=("protocol", "mode"))


class Analyses(NamedTuple):
    """The analyses of the wirings of some variants, of single gates of the base, and of the planted base."""

    topology: dict[str, Record]  # topology.json by variant
    sensitivity: Record  # summary.json
    removal: "pd.DataFrame"  # a row for each order and fraction
    planted: Record | None  # known.json
    methods: Record | None  # methods.json


def read_results(settings: Settings) -> Results:
    """Reads what training and evaluation left of the variants that the settings name.

    Raises:
        DynarouteError: a file is missing or damaged, or the settings do not name the main variant.
    """
    for key, names in (("variants", settings.variants), ("analysis.variants", settings.analysis.variants)):
        if MAIN not in names:
            raise DynarouteError(f"params.yaml: {key} = {list(names)}: must hold {MAIN}, which the report is about")
    by_base: dict[str, dict[str, Variant]] = {base: {} for base in BASES}
    for name in settings.variants:
        by_base[settings.base_of(name)][name] = read_variant(name)
    setup = Record(settings.dagformer.model_dump(), "params.yaml")
    return Results(*by_base.values(), read_record(DATA / "base.json"), setup)


def read_variant(name: str) -> Variant:
    """Reads all of one variant. Raises DynarouteError if a file is missing or damaged."""
    trained, evaluated = DATA / "train" / name, DATA / "eval" / name
    return Variant(
        name,
        run=read_record(trained / "run.json"),
        training=read_record(trained / "training.json"),
        curve=read_csv(trained / "training.csv", "step", "train_loss", "validation_nll_hard"),
        evaluation=read_record(evaluated / "nll.json"),
        windows=read_csv(evaluated / "nll.csv", "protocol", "document", "nll_soft", "nll_hard"),
    )


def read_comparisons() -> Comparisons:
    """Reads what was compared. Raises DynarouteError if a file is missing or damaged."""
    found = read_record(DATA / "comparisons.json")
    rows = read_csv(REPORTS / "variants.csv", "variant", "protocol", "mode", "difference", "low", "high")
    indexed = rows.set_index(["variant", "protocol", "mode"])
    return Comparisons(found["primary"], found["seeds"], found["control_seeds"], indexed)


def read_analyses(settings: Settings) -> Analyses:
    """Reads all analyses. Raises DynarouteError if a file is missing or damaged."""
    topology = {name: read_record(DATA / "analysis" / name / "topology.json") for name in settings.analysis.variants}
    sensitivity = read_record(DATA / "sensitivity/summary.json")
    removal = read_csv(DATA / "sensitivity/removal.csv", "order", "fraction", "draws", "mean", "low", "high")
    planted, methods = (read_record(DATA / f"planted/{name}.json") for name in ("known", "methods"))
    return Analyses(topology, sensitivity, removal, planted or None, methods or None)
