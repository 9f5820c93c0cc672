"""Cells, sentences and tables that several sections of the report share."""

from typing import get_args

from dynaroute.analysis.statistics import Interval, Verdict, verdict
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import MODES, PROTOCOLS, Results, Variant
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, count, table

VERDICTS = get_args(Verdict)
MAX_ROWS = 14  # of a per-step table; the file has all of them


def signed(value: float) -> str:
    """A difference to four digits after the point, with its sign; no minus before a zero."""
    return f"{round(value, 4) + 0.0:+.4f}"


def interval(found: Interval | None) -> str:
    """A difference with its interval and verdict, for a cell of a table."""
    if found is None:
        return NONE
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}] {verdict(found)}"


def numbers(found: Interval) -> str:
    """A difference with its interval and n, for a sentence that says the verdict."""
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}], n = {found.n:,}"


def difference(found: Interval) -> str:
    """A difference with its interval, n and verdict, for a sentence."""
    return f"{numbers(found)}: {verdict(found)}"


def to_baseline(variant: Variant, analyses: Analyses) -> str:
    """Both modes against the baseline by the window protocol, with corrected verdicts, for a sentence."""
    return "; ".join(
        f"{mode} {numbers(variant.to_baseline(mode, 'window'))}: "
        f"{analyses.verdict('baseline', variant.name, mode, 'window')}"
        for mode in MODES
    )


def course(start: float, end: float) -> str:
    """Where a schedule begins and ends."""
    return f"{start:g}→{end:g}"


def knobs(values: Record) -> str:
    """What makes a variant, in one line."""
    cascade = values["cascade"] if values["cascade"] == "off" else f"k={values['cascade_k']:g} {values['cascade']}"
    tau, weight = (course(values[f"{name}_init"], values[f"{name}_final"]) for name in ("tau", "lambda"))
    return f"r={values['rank']}, tau={tau}, cascade {cascade}, lambda={weight}"


def budget(results: Results, variant: Variant) -> str:
    """Tokens and steps that a variant was trained for."""
    batch = f"{variant.knobs['batch_size']} x {results.setup['seq_len']}"
    return f"{variant.training['tokens']:,} ({count(variant.training['steps'], 'step')} of {batch})"


def by_verdict(found: dict[str, Verdict]) -> str:
    """Sorts a number of differences by verdict: "better: A1; no difference shown: A2, A3"."""
    groups = {words: [name for name, one in found.items() if one == words] for words in VERDICTS}
    return "; ".join(f"{words}: {', '.join(members)}" for words, members in groups.items() if members)


def metrics(variant: Variant) -> str:
    """All that the evaluation found of a variant, a column for each protocol."""
    evaluated = [variant.evaluation[protocol] for protocol in PROTOCOLS]
    rows = [[f"nll_{mode}", *(f"{one[f'nll_{mode}']:.4f}" for one in evaluated)] for mode in (*MODES, "baseline")]
    rows += [
        [f"nll_{mode} - nll_baseline", *(interval(variant.to_baseline(mode, protocol)) for protocol in PROTOCOLS)]
        for mode in MODES
    ]
    rows += [[name, *(show(one) for one in evaluated)] for name, show in TOPOLOGY]
    return table(["metric", *(f"{protocol} protocol" for protocol in PROTOCOLS)], rows)


TOPOLOGY = [
    ("mean_A", lambda found: f"{found['mean_A']:.3f}"),
    ("seq_gate_frac", lambda found: f"{found['seq_gate_frac']:.3f}"),
    ("hyp_gate_frac", lambda found: f"{found['hyp_gate_frac']:.3f}"),
    ("hard density", lambda found: f"{found['density_hard']:.3f}"),
    ("A entropy (bits)", lambda found: f"{found['entropy_bits']:.3f}"),
    ("dead heads", lambda found: f"{found['dead_heads']}"),
]


def steps(variant: Variant, *further: str) -> str:
    """NLL and mean_A by step, and further columns of the training curve."""
    curve = variant.curve
    shown = sorted({*range(0, len(curve), -(-len(curve) // (MAX_ROWS - 1))), len(curve) - 1})
    columns = [f"validation_{name}" for name in ("nll_soft", "nll_hard", "nll_baseline", "mean_A")] + list(further)
    rows = [
        [f"{row['step']:,.0f}", *(CURVE[name][1].format(row[name]).replace("nan", NONE) for name in columns)]
        for _, row in curve.iloc[shown].iterrows()
    ]
    parts = [table(["step", *(CURVE[name][0] for name in columns)], rows)]
    if omitted := len(curve) - len(shown):
        parts.append(f"{omitted} of {len(curve)} validations are left out; `{variant.name}/training.csv` has all.")
    return "\n\n".join(parts)


CURVE = {  # title and format of a column
    "validation_nll_soft": ("nll_soft", "{:.4f}"),
    "validation_nll_hard": ("nll_hard", "{:.4f}"),
    "validation_nll_baseline": ("nll_base", "{:.4f}"),
    "validation_mean_A": ("mean_A", "{:.3f}"),
    "validation_density_hard": ("hard density", "{:.3f}"),
    "validation_tau": ("tau", "{:.3g}"),
    "validation_lambda": ("lambda", "{:.3g}"),
    "train_loss": ("train NLL", "{:.4f}"),
    "train_gate_gradient": ("gradient at the gates", "{:.2e}"),
    "train_gate_slope": ("slope dA/dZ", "{:.2e}"),
}


def published_steps(rows: list[Record]) -> str:
    """Per-step numbers of the reference."""
    columns = [name for name in ("train_nll", "nll_soft", "nll_hard", "nll_base", "mean_A", "tau") if name in rows[0]]
    digits = {  # YAML forgets the zeros at the end of what was published
        name: max(len(f"{row[name]}".partition(".")[2]) for row in rows if row[name] is not None) for name in columns
    }
    cells = [
        [f"{row['step']:,}", *(NONE if row[name] is None else f"{row[name]:.{digits[name]}f}" for name in columns)]
        for row in rows
    ]
    return table(["step", *columns], cells)
