"""X3: how the base's NLL depends on single gates, edges, layer pairs and heads; and what gates can do at best."""

from typing import TYPE_CHECKING

from dynaroute.analysis.statistics import SIGNIFICANT, Interval, corrected_verdict
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.topology import p_value
from dynaroute.reporting.dagformer.wording import numbers, signed
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import count, figure, table

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # layer pairs and heads that matter most
ORDERS = {"random": "random", "least_gradient": "least gradient first", "expected_gain": "expected gain first"}
TEXTS = {"same": "the window itself", "next": "the text that follows it", "other": "a window of another document"}


def sensitivity(analyses: Analyses) -> str:
    """The whole section."""
    found, shape = analyses.sensitivity, analyses.sensitivity["flatness"]
    gradient_rows = [
        ["windows, documents, gates", f"{shape['n']:,}, {shape['documents']:,}, {shape['gates']:,}"],
        ["mean size of a gate's gradient in one window", f"{shape['size']:.2e}"],
        ["mean size of a gate's mean gradient", f"{shape['size_of_mean']:.2e}"],
        ["the same with signs flipped by document", f"{shape['size_by_chance']:.2e}, {p_value(shape['p'])}"],
        ["gates whose gradient says that closing them would help, after correction", f"{shape['harmful']:.1%}"],
        ["gates whose gradient says that closing them would harm, after correction", f"{shape['helpful']:.1%}"],
        ["sign consistency over windows (by chance)", _consistency(shape)],
    ]
    own = found["adjacent_minus_skip"]
    return "\n\n".join(
        [
            "No predictor takes part here. " + flat_sentence(found),
            "Windows are evenly chosen over documents, and documents are what every test here counts, since windows of "
            "one document are alike: intervals are Student's t over the means of documents, and p-values are of sign "
            "flips of whole documents, corrected within a table (Westfall and Young, step-down).",
            "Gradients of each window's NLL with respect to every gate, at A = 1:",
            table(["measure", "found"], gradient_rows),
            f"Gates between adjacent layers have gradients of mean size {own['adjacent']:.2e}, those that skip layers "
            f"{own['skip']:.2e}: the difference is {own['mean']:+.2e}, over documents "
            f"[{own['bootstrap_low']:+.2e}, {own['bootstrap_high']:+.2e}], {p_value(own['p'])}, "
            f"{count(own['groups'], 'document')}.",
            "**Edges removed for real.** NLL less that at A = 1, on windows of other documents than those that the "
            "orders come from. Least gradient first removes what matters least to first order. Expected gain first "
            "removes the edge whose gradient says that NLL falls most. " + removal_sentence(analyses),
            sign_sentence(analyses.removal),
            _removal(analyses.removal),
            order_sentence(found),
            f"**Layer pairs**, each removed alone: {_outcomes(found['removal']['layer_pairs'])}. The largest changes:",
            _worst(analyses.layer_pairs, "layers", lambda row: f"{row['source']:.0f} → {row['target']:.0f}"),
            "**Heads**, each cut off from all others alone, in and out; it still adds to MLPs and output: "
            f"{_outcomes(found['removal']['heads'])}. The largest changes:",
            _worst(analyses.heads, "layer, head", lambda row: f"{row['layer']:.0f}, {row['head']:.0f}"),
            figure(
                "figures/dagformer_sensitivity.png",
                "Size of gradients at A = 1 by layer pair; rise in NLL without a layer pair, and without a head.",
            ),
            "**An upper reference.** Gates optimised directly on one window for "
            f"{count(found['oracle']['steps'], 'step')} from A = 1. {oracle_sentence(found)}",
            table(
                ["scored on", "optimised gates - A = 1 [95 %]", "p, corrected", "verdict", "detectable", "documents"],
                [[words, *_cells(own), f"{own['detectable']:.4f}", f"{own['documents']}"]
                 for text, words in TEXTS.items() for own in [found["oracle"][text]]],
            ),
            figure(
                "figures/dagformer_removal.png",
                "NLL by the fraction of edges removed, and what optimised gates gain, with 95 % intervals.",
            ),
        ]
    )  # fmt: skip


def flat_sentence(found: Record) -> str:
    """Whether NLL is flat at A = 1, by rule: by the test of all gates together."""
    shape = found["flatness"]
    rests = (
        f"mean gradient of all gates together {p_value(shape['p'])} by document; gates whose own mean gradient is "
        f"certain: {shape['harmful'] + shape['helpful']:.1%} of {shape['gates']:,}; {_size(shape)}"
    )
    outcome = "NLL is not flat at A = 1" if shape["slopes"] else "That NLL is not flat at A = 1 is not shown"
    return f"{outcome} ({rests})."


def removal_sentence(analyses: Analyses) -> str:
    """What any removal was shown to do, by corrected verdicts, and what removing all costs."""
    found = {
        **{f"{ORDERS[row['order']]} {row['fraction']:.0%}": row for row in analyses.removal.to_dict("records")},
        **{f"layers {row['source']} → {row['target']}": row for row in analyses.layer_pairs.to_dict("records")},
        **{f"head {row['layer']}, {row['head']}": row for row in analyses.heads.to_dict("records")},
    }
    better = [f"{name} ({numbers(_interval(row))})" for name, row in found.items() if _verdict(row) == "better"]
    tried = f"of {len(found):,} removals, by order and fraction, layer pair or head"
    if better:
        outcome = f"Removing edges lowers NLL for, {tried}: {', '.join(better)}."
    else:
        outcome = f"No removal is shown to lower NLL, {tried}."
    largest = analyses.removal[analyses.removal["fraction"] == analyses.removal["fraction"].max()].iloc[0]
    return (
        f"{outcome} Removing {largest['fraction']:.0%} of edges changes NLL by {numbers(_interval(largest))}: "
        f"{_verdict(largest)}."
    )


def sign_sentence(removal: "pd.DataFrame") -> str:
    """Whether closing the edges that gradients promise most of lowers NLL, by corrected verdicts."""
    parts = removal[(removal["order"] == "expected_gain") & (removal["fraction"] < 1)]  # of all edges no order is left
    outcomes: dict[str, list[str]] = {}
    for _, row in parts.sort_values("fraction").iterrows():
        outcomes.setdefault(_verdict(row), []).append(f"{row['fraction']:.0%} ({_change(row)})")
    if not outcomes:
        return "No part of the edges was removed, so whether gradients foretell the right sign was not measured."
    if "better" in outcomes and "worse" in outcomes:
        found = "Gradients foretell the sign for some fractions of edges and the wrong one for others"
    elif "better" in outcomes:
        found = "Gradients foretell the right sign"
    elif "worse" in outcomes:
        found = "Gradients foretell the wrong sign"
    else:
        found = "That gradients foretell the sign, right or wrong, is not shown"
    words = {"better": "lowered NLL", "worse": "raised NLL"}
    told = "; ".join(f"{words.get(outcome, outcome)}: {', '.join(own)}" for outcome, own in outcomes.items())
    return (
        f"{found}: closing the edges whose gradients promise most, by the share of edges closed: {told}. "
        "A gradient at A = 1 is of an infinitesimal change of one gate, and closing many is neither."
    )


def order_sentence(found: Record) -> str:
    """How the orders that gradients give compare with the random one, on the same windows, by corrected verdicts."""
    rows = found["removal"]["orders"]
    if not rows:
        return "No part of the edges was removed, so no order is compared with another."
    words = {"better": "is better", "worse": "is worse", "no difference shown": "no difference is shown"}
    parts = []
    for order in dict.fromkeys(row["order"] for row in rows):
        own = [row for row in rows if row["order"] == order]
        outcomes = [
            f"{words[_verdict(row)]} at {row['fraction']:.0%} ({_change(row)}, {p_value(row['p_corrected'])})"
            for row in own
        ]
        parts.append(f"{ORDERS[order]}: {', '.join(outcomes)}")
    return (
        "NLL less that of the random order at the same fraction, paired, which shows whether gradients rank edges by "
        f"what removal does: {'; '.join(parts)}; {_size(rows[0])}."
    )


def oracle_sentence(found: Record) -> str:
    """How much of the oracle's gain is memorisation, by rule."""
    own, after, share = (found["oracle"][key] for key in ("same", "next", "carried_over"))
    gain = (
        f"On its own window it changes NLL by {_change(own)}: {_verdict(own)}; on the text that follows by "
        f"{_change(after)}: {_verdict(after)}; {_size(own)}."
    )
    if _verdict(own) != "better":
        return f"{gain} A gain is not shown, so there is nothing to explain."
    carried = f"{share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"
    shown = {"better": "some of it is shown to carry over", "worse": "these gates are shown to harm it"}
    outcome = shown.get(_verdict(after), "that any of it carries over is not shown")
    return f"{gain} The text that follows keeps {carried} of the gain (bootstrap of documents): {outcome}."


def _consistency(shape: Record) -> str:
    return f"{shape['sign_consistency']:.3f} ({shape['sign_consistency_by_chance']:.3f})"


def _removal(removal: "pd.DataFrame") -> str:
    fractions = sorted(set(removal["fraction"]))
    rows = []
    for order, words in ORDERS.items():
        own = removal[removal["order"] == order].set_index("fraction")
        rows.append([words, *(f"{_change(own.loc[one])} {_verdict(own.loc[one])}" for one in fractions)])
    first = removal[removal["order"] == "random"].iloc[0]
    return (
        f"{table(['order', *(f'{fraction:.0%}' for fraction in fractions)], rows)}\n\n{_size(first)}. The random order "
        f"is the mean of {count(int(first['draws']), 'draw')}; its interval is over documents, for these draws, and "
        "leaves out how draws differ."
    )


def _interval(row: "pd.Series | Record") -> Interval:
    return Interval(row["difference"], row["low"], row["high"], int(row["n"]))


def _change(row: "pd.Series | Record") -> str:
    """A difference with its interval, for a sentence or cell that says verdict and n elsewhere."""
    return f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}]"


def _verdict(row: "pd.Series | Record") -> str:
    return corrected_verdict(row["difference"], row["p_corrected"])


def _size(row: "pd.Series | Record") -> str:
    return f"n = {count(int(row['n']), 'window')} of {count(int(row['documents']), 'document')}"


def _cells(row: "pd.Series | Record") -> list[str]:
    return [_change(row), f"{row['p_corrected']:.2g}", _verdict(row)]


def _outcomes(found: Record) -> str:
    return (
        f"{found['worse']} raise NLL, {found['better']} lower it and for {found['no_difference_shown']} no difference "
        f"is shown (corrected p below {SIGNIFICANT}). A change of {found['detectable']:.4f} (median) would be shown "
        "four times in five"
    )


def _worst(rows: "pd.DataFrame", title: str, name: object) -> str:
    worst = rows.sort_values("difference", ascending=False, kind="stable").head(SHOWN)
    cells = [[name(row), *_cells(row)] for _, row in worst.iterrows()]
    return table([title, "NLL - NLL at A = 1 [95 %]", "p, corrected", "verdict"], cells)
