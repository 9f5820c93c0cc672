"""The files that the DAGFormer stages wrote, as one consistent set: variants are compared only on the same base."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dynaroute.config import Settings
from dynaroute.config.dagformer import BASES, CONTROLS, MODES
from dynaroute.errors import DynarouteError
from dynaroute.reporting.inputs import REMEDY, Record, check_same_run, read_csv, read_record

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd  # at run time where tables are read: it is slow to import

DATA = Path("data/dagformer")
REPORTS = Path("reports/dagformer")
MAIN, CONTROL = "P1", "C1"  # every variant is P1 with overrides; C1 has one wiring for all texts
JOINT = ("J1", "J0")  # the base trained jointly with the predictor, and trained on with all gates held open
# What may differ between a variant and the same one at another budget.
BUDGET = {"steps", "validate_every", "checkpoint_every", "micro_batch_size"}
BASELINE_COLUMNS = ["protocol", "window", "document", "source", "nll_baseline"]  # of nll.csv; the same for all variants
VALIDATED = [
    *("step", "tokens", "validation_nll_soft", "validation_nll_hard", "validation_nll_baseline", "validation_mean_A"),
    *("validation_density_hard", "validation_tau", "validation_lambda"),
]
TRAINED = ["train_loss", "train_gate_gradient", "train_gate_slope"]  # no value at step 0


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

    def is_main(self, variant: Variant) -> bool:
        """Whether a variant is the main one, at whatever budget."""
        return set(variant.changes(self.main)) <= BUDGET

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
            if self.is_main(other) and other.knobs["steps"] == variant.knobs["steps"]:
                return None if other is variant else other.name
        return None


class Comparisons(NamedTuple):
    """What `compare_variants` computed of those results."""

    primary: list[Record]
    seeds: Record
    control_seeds: Record
    headroom: float  # what closing all gates costs the base
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
        DynarouteError: a file is missing, damaged or of another run, or the variants do not share base and text.
    """
    for key, names in (("variants", settings.variants), ("analysis.variants", settings.analysis.variants)):
        if MAIN not in names:
            raise DynarouteError(f"params.yaml: {key} = {list(names)}: must hold {MAIN}, which the report is about")
    by_base: dict[str, dict[str, Variant]] = {base: {} for base in BASES}
    for name in settings.variants:
        by_base[settings.base_of(name)][name] = read_variant(name)
    setup, main = Record(settings.dagformer.model_dump(), "params.yaml"), by_base["base"][MAIN]
    for variants in by_base.values():
        for variant in variants.values():
            first = next(iter(variants.values()))
            for key in ("dagformer", "base"):
                if variant.run["identity"][key] != first.run["identity"][key]:
                    raise DynarouteError(f"{variant.run.path}: {key} is not that of {first.run.path}: run dvc repro")
            if not variant.windows[BASELINE_COLUMNS].equals(first.windows[BASELINE_COLUMNS]):
                path = DATA / "eval" / variant.name / "nll.csv"
                raise DynarouteError(
                    f"{path}: its windows or baseline NLL are not those of {first.name}: run dvc repro"
                )
    for key, value in main.run["identity"]["dagformer"].items():
        if setup[key] not in (value, None):  # null: all windows, and embeddings and training depend on how many
            raise DynarouteError(
                f"{main.run.path}: trained with dagformer.{key} = {value}, not {setup[key]}: run dvc repro"
            )
    return Results(*by_base.values(), read_record(DATA / "base.json"), setup)


def read_variant(name: str) -> Variant:
    """Reads all of one variant.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    trained, evaluated = DATA / "train" / name, DATA / "eval" / name
    run, training = read_record(trained / "run.json"), read_record(trained / "training.json")
    evaluation = read_record(evaluated / "nll.json")
    check_same_run(run["run"], training, evaluation)
    path = trained / "training.csv"
    curve = read_csv(path, VALIDATED)
    for column in TRAINED:
        if column not in curve or len(curve) < 2 or curve.loc[curve["step"] > 0, column].isna().any():
            raise DynarouteError(f"{path}: {column!r} must hold a number in every row after step 0: {REMEDY}")
    numbers = ["window", "document", *(f"nll_{mode}" for mode in (*MODES, *CONTROLS, "least_gradient"))]
    return Variant(name, run, training, curve, evaluation, read_csv(evaluated / "nll.csv", numbers, ["protocol"]))


def read_comparisons(results: Results) -> Comparisons:
    """Reads what was compared.

    Raises:
        DynarouteError: a file is missing, damaged, or of other variants.
    """
    path = REPORTS / "variants.csv"
    found, rows = read_record(DATA / "comparisons.json"), read_csv(path, ["nll", "difference", "low", "high"])
    if list(rows["variant"].unique()) != [*results.variants, *results.planted]:
        raise DynarouteError(f"{path}: not of the variants of params.yaml: {REMEDY}")
    indexed = rows.set_index(["variant", "protocol", "mode"])
    return Comparisons(found["primary"], found["seeds"], found["control_seeds"], found["headroom"], indexed)


def read_analyses(settings: Settings, results: Results) -> Analyses:
    """Reads all analyses.

    Raises:
        DynarouteError: a file is missing, damaged, or of another base or run than the results.
    """
    topology = {name: read_record(DATA / "analysis" / name / "topology.json") for name in settings.analysis.variants}
    for name, found in topology.items():
        check_same_run(results.variants[name].run["run"], found)
    folder = DATA / "sensitivity"
    sensitivity = read_record(folder / "summary.json")
    if sensitivity["base"] != results.main.run["identity"]["base"]:
        raise DynarouteError(f"{sensitivity.path}: of another base than {results.main.run.path}: run dvc repro")
    removal = read_csv(folder / "removal.csv", ["fraction", "draws", "mean", "low", "high", "over_random"])
    planted, methods = (read_record(DATA / f"planted/{name}.json") for name in ("known", "methods"))
    for name, variant in results.planted.items():
        check_same_run(variant.run["run"], Record(methods[name], methods.path))
    return Analyses(topology, sensitivity, removal, planted or None, methods or None)
