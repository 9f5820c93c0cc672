"""The files that the DAGFormer stages wrote, as one consistent set: variants are compared only on the same base."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.analysis.statistics import Interval, paired_difference
from dynaroute.config import Settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.inputs import REMEDY, Record, check_same_run, read_checkpoint, read_csv, read_record

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd  # at run time where tables are read: it is slow to import
    from torch import Tensor

DATA = Path("data/dagformer")
REPORTS = Path("reports/dagformer")
MEASURED = Path("reports/dagformer_measured")
EVALUATIONS = Path("data/eval")
REFERENCE = Path("reports/reference.yaml")
BENCHMARK = Path("reports/benchmarks/dag.json")

REFERENCE_VARIANT = "P1"  # every variant is this one with overrides
CONTROL = "C1"  # one topology for all texts
JOINT = ("J1", "J0")  # the base trained jointly with the predictor, and trained on with all gates held open
MODES = ("soft", "hard")  # beside the baseline, in which every gate is one
PROTOCOLS = ("window", "prefix")
# What may differ between a variant and the same one at another budget.
BUDGET = {"steps", "validate_every", "checkpoint_every", "micro_batch_size"}
VALIDATED = [
    *("step", "tokens", "validation_nll_soft", "validation_nll_hard", "validation_nll_baseline", "validation_mean_A"),
    *("validation_density_hard", "validation_seq_gate_frac", "validation_hyp_gate_frac"),
    *("validation_tau", "validation_lambda"),
]
TRAINED = ["train_loss", "train_mean_A", "train_gate_gradient", "train_gate_slope"]  # no value at step 0


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

    @property
    def nodes(self) -> int:
        """Attention heads of the base, N."""
        return self.run["num_layers"] * self.run["num_heads"]

    def differs_from(self, other: "Variant") -> list[str]:
        """The knobs in which it differs."""
        return [key for key, value in self.knobs.items() if value != other.knobs[key]]

    def nll(self, mode: str, protocol: str) -> float:
        """Mean NLL in nats per token; the mode may be baseline as well."""
        return self.evaluation[protocol][f"nll_{mode}"]

    def to_baseline(self, mode: str, protocol: str) -> Interval:
        """The paired difference of a mode's NLL to the baseline's, as the evaluation found it."""
        return to_baseline(self.evaluation, mode, protocol)

    def minus(self, other: "Variant", mode: str, protocol: str) -> Interval:
        """The paired difference of a mode's NLL to that of another variant, on the same windows."""
        return paired_difference(self.window_nll(mode, protocol), other.window_nll(mode, protocol))

    def window_nll(self, mode: str, protocol: str) -> "np.ndarray":
        """NLL of every held-out window, [n]; the mode may be baseline as well."""
        return self.windows.loc[self.windows["protocol"] == protocol, f"nll_{mode}"].to_numpy()


class Pool(NamedTuple):
    """Variants of one base whose average is tested in their place."""

    name: str
    members: list[Variant]

    def window_nll(self, mode: str, protocol: str) -> "np.ndarray":
        """NLL of every held-out window, [n], averaged over the members; the mode may be baseline as well."""
        return sum(member.window_nll(mode, protocol) for member in self.members) / len(self.members)


class Results(NamedTuple):
    """Everything that the report is made from but for measurements."""

    variants: dict[str, Variant]  # in the order of params.yaml
    base: Record  # base.json
    tokens: Record  # metadata.json of the token shards
    reference: Record  # the published numbers
    setup: Record  # what all variants share: `dagformer` of params.yaml

    @property
    def main(self) -> Variant:
        """The variant that the others are compared with."""
        return self.variants[REFERENCE_VARIANT]

    @property
    def num_windows(self) -> int:
        """Held-out windows that every variant was evaluated on."""
        return self.main.evaluation["n"]

    def peers(self) -> list[Variant]:
        """The main variant, and those that are it at another budget."""
        return [other for other in self.variants.values() if set(other.differs_from(self.main)) <= BUDGET]

    def seeds(self) -> list[Variant]:
        """The main variant with each of its seeds, at the budget at which most were run."""
        budgets: dict[int, list[Variant]] = {}
        for other in self.variants.values():
            if set(other.differs_from(self.main)) <= BUDGET | {"seed"}:
                budgets.setdefault(other.knobs["steps"], []).append(other)
        return max(budgets.values(), key=len)

    def pools(self) -> list[Pool]:
        """What is tested for its direction as a whole, fixed without regard to any outcome.

        They are all variants whose base is frozen, whatever they change, and the main one over its seeds.
        """
        frozen = [variant for variant in self.variants.values() if variant.knobs["base_lr"] == 0]
        found = [Pool("frozen base", frozen), Pool(f"{REFERENCE_VARIANT} over seeds", self.seeds())]
        return [pool for pool in found if len(pool.members) > 1]

    @property
    def joint(self) -> tuple[Variant, Variant] | None:
        """The variant whose base was trained jointly, and the same base trained alone; None unless there are both."""
        found = [self.variants.get(name) for name in JOINT]
        return None if None in found else (found[0], found[1])

    def ablations(self) -> list[Variant]:
        """Variants to compare with the main one: on the frozen base, and other than it in more than seed or budget."""
        same = BUDGET | {"seed"}
        return [
            other
            for other in self.variants.values()
            if other.knobs["base_lr"] == 0 and not set(other.differs_from(self.main)) <= same
        ]

    def peer(self, variant: Variant) -> Variant | None:
        """The main variant at this one's budget, to compare it with; None if there is none."""
        return next((other for other in self.peers() if other.knobs["steps"] == variant.knobs["steps"]), None)


class Measurements(NamedTuple):
    """What was measured, on which machine."""

    base: Record  # base.json of what was measured
    variants: dict[str, Record]  # by name
    benchmark: Record | None  # of the DAG forward, by a target of its own; None if it was not run


def read_measurements(results: Results) -> Measurements:
    """Reads what was measured on the runs of these results.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    timings = {name: read_record(MEASURED / f"{name}.json") for name in results.variants}
    benchmark = read_record(BENCHMARK) if BENCHMARK.exists() else None
    return Measurements(read_record(MEASURED / "base.json"), timings, benchmark)


def read_results(settings: Settings) -> Results:
    """Reads everything but measurements, of the variants that the settings name.

    Raises:
        DynarouteError: a file is missing, damaged or of another run, or the variants do not share base and text.
    """
    check_has_main(settings)
    variants = {name: read_variant(name) for name in settings.variants}
    check_comparable(list(variants.values()))
    setup = Record(settings.dagformer.model_dump(), "params.yaml")
    main = variants[REFERENCE_VARIANT].run
    for key, value in main["identity"]["dagformer"].items():
        if value != setup[key]:
            raise DynarouteError(
                f"{main.path}: trained with dagformer.{key} = {value}, not {setup[key]}: run dvc repro"
            )
    tokens = read_record(Path("data/tokens") / setup["corpus"] / "metadata.json")
    return Results(variants, read_record(REPORTS / "base.json"), tokens, read_record(REFERENCE)["dagformer"], setup)


def check_has_main(settings: Settings) -> None:
    """Refuses settings without the variant that the others are compared with.

    Raises:
        DynarouteError: there is none.
    """
    if REFERENCE_VARIANT not in settings.variants:
        raise DynarouteError(f"variants: the report compares with {REFERENCE_VARIANT}, which params.yaml does not list")
    if REFERENCE_VARIANT not in settings.analysis.variants:
        raise DynarouteError(
            f"analysis.variants: the report shows {REFERENCE_VARIANT}, which params.yaml does not list"
        )


def read_variant(name: str) -> Variant:
    """Reads all of one variant.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    run, training = read_record(DATA / name / "run.json"), read_record(REPORTS / name / "training.json")
    evaluation = read_evaluation(name)
    check_same_run(run["run"], training, evaluation)
    columns = ["window", "tokens", "nll_soft", "nll_hard", "nll_baseline"]
    return Variant(name, run, training, read_curve(name), evaluation, read_csv(REPORTS / name / "nll.csv", columns))


def read_curve(name: str) -> "pd.DataFrame":
    """Reads a variant's validations.

    Raises:
        DynarouteError: the file is missing, damaged, or lacks what reports need.
    """
    path = REPORTS / name / "training.csv"
    curve = read_csv(path, VALIDATED)
    trained = curve[curve["step"] > 0]
    for column in TRAINED:
        if trained.empty or column not in trained or trained[column].isna().any():
            raise DynarouteError(f"{path}: {column!r} must hold a number in every row after step 0: {REMEDY}")
    return curve


def read_evaluation(name: str) -> Record:
    """Reads a variant's evaluation on held-out windows.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    return read_record(REPORTS / name / "nll.json")


class MeanGates(NamedTuple):
    """Adjacency averaged over the held-out windows, [N, N] each."""

    soft: "Tensor"
    hard: "Tensor"
    num_heads: int


def read_mean_gates(name: str) -> MeanGates:
    """Reads a variant's mean adjacency, of the window protocol.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    tensors, state = read_checkpoint(EVALUATIONS / name / "gates.safetensors")
    return MeanGates(tensors["window.mean_soft"], tensors["window.mean_hard"], state["num_heads"])


def to_baseline(evaluation: Record, mode: str, protocol: str) -> Interval:
    """The paired difference of a mode's NLL to the baseline's in an nll.json."""
    found = evaluation[protocol][f"{mode}_minus_baseline"]
    return Interval(found["mean"], found["low"], found["high"], found["n"])


def check_comparable(variants: list[Variant]) -> None:
    """Refuses variants of different bases or texts, and a baseline that is not the same number for all of them.

    Raises:
        DynarouteError: naming the file that does not fit.
    """
    from dynaroute.analysis.nll import check_same_baseline  # it is slow to import

    first = variants[0]
    for variant in variants[1:]:
        for key in ("dagformer", "base"):
            if variant.run["identity"][key] != first.run["identity"][key]:
                raise DynarouteError(f"{variant.run.path}: {key} is not that of {first.run.path}: run dvc repro")
    check_same_baseline([REPORTS / variant.name / "nll.csv" for variant in variants])
