"""X3: how the base's NLL depends on single gates, edges, layer pairs and heads; and what gates can do at best."""

from typing import TYPE_CHECKING

from dynaroute.evaluation.statistics import SIGNIFICANT, Interval, corrected_verdict, verdict
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.topology import p_value, to_interval
from dynaroute.reporting.dagformer.wording import interval, numbers
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import count, figure, table

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # layer pairs and heads that matter most
ORDERS = {"random": "random", "least_gradient": "least gradient first", "expected_gain": "expected gain first"}
TEXTS = {"same": "the window itself", "next": "the text that follows it", "other": "another of these windows"}


def sensitivity(analyses: Analyses) -> str:
    """The whole section."""
    found, shape = analyses.sensitivity, analyses.sensitivity["flatness"]
    gradient_rows = [
        ["windows, gates", f"{shape['n']:,}, {shape['gates']:,}"],
        ["mean size of a gate's gradient in one window", f"{shape['size']:.2e}"],
        ["mean size of a gate's mean gradient", f"{shape['size_of_mean']:.2e}"],
        ["the same with signs flipped by document", f"{shape['size_by_chance']:.2e}, {p_value(shape['p'])}"],
        ["gates that closing would help, after correction", f"{shape['harmful']:.1%}"],
        ["gates that closing would harm, after correction", f"{shape['helpful']:.1%}"],
        ["sign consistency over windows (by chance)", _consistency(shape)],
    ]
    own = found["adjacent_minus_skip"]
    return "\n\n".join(
        [
            "No predictor takes part here. " + flat_sentence(found),
            "Gradients of each window's NLL with respect to every gate, at A = 1:",
            table(["measure", "found"], gradient_rows),
            f"Gates between adjacent layers have gradients of mean size {own['adjacent']:.2e}, those that skip layers "
            f"{own['skip']:.2e}: the difference is {own['mean']:+.2e} [{own['low']:+.2e}, {own['high']:+.2e}], "
            f"n = {own['n']:,}, {p_value(own['p'])} by document.",
            "**Edges removed for real.** NLL less that at A = 1, on windows of other documents than those that the "
            "orders come from. Least gradient first removes what matters least to first order. Expected gain first "
            "removes the edge whose gradient says that NLL falls most. " + removal_sentence(analyses),
            _removal(analyses.removal),
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
                ["scored on", "optimised gates - A = 1 [95 %]", "n"],
                [[words, interval(to_interval(found["oracle"][text])), f"{found['oracle'][text]['n']}"]
                 for text, words in TEXTS.items()],
            ),
            figure(
                "figures/dagformer_removal.png",
                "NLL by the fraction of edges removed, and what optimised gates gain, with 95 % intervals.",
            ),
        ]
    )  # fmt: skip


def flat_sentence(found: Record) -> str:
    """Whether NLL is flat at A = 1, by rule."""
    shape = found["flatness"]
    rests = (
        f"mean gradient of all gates together {p_value(shape['p'])}; gates whose own mean gradient is certain: "
        f"{shape['harmful'] + shape['helpful']:.1%} of {shape['gates']:,}; n = {shape['n']:,}"
    )
    if shape["flat"]:
        return f"NLL is flat at A = 1, as far as first order shows ({rests})."
    return f"NLL is not flat at A = 1 ({rests})."


def removal_sentence(analyses: Analyses) -> str:
    """Whether removing edges ever helped, by rule, and what removing all costs."""
    table = analyses.removal
    better = [row for row in table.to_dict("records") if verdict(_interval(row)) == "better"]
    if better:
        words = ", ".join(f"{ORDERS[row['order']]} {row['fraction']:.0%} ({numbers(_interval(row))})" for row in better)
        outcome = f"Removing edges lowers NLL for: {words}."
    else:
        outcome = "No removal lowers NLL."
    largest = table[table["fraction"] == table["fraction"].max()].iloc[0]
    return f"{outcome} Removing {largest['fraction']:.0%} of edges changes NLL by {numbers(_interval(largest))}."


def oracle_sentence(found: Record) -> str:
    """How much of the oracle's gain is memorisation, by rule."""
    own, after = (to_interval(found["oracle"][text]) for text in ("same", "next"))
    gain = f"On its own window it changes NLL by {numbers(own)}; on the text that follows by {numbers(after)}."
    if verdict(own) != "better":
        return f"{gain} It gains nothing, so there is nothing to explain."
    if verdict(after) == "better":
        return (
            f"{gain} {after.mean / own.mean:.0%} of the gain carries over to the text that follows; the rest does not."
        )
    return f"{gain} No part of the gain is shown to carry over: what it finds is that window's own."


def _consistency(shape: Record) -> str:
    return f"{shape['sign_consistency']:.3f} ({shape['sign_consistency_by_chance']:.3f})"


def _removal(removal: "pd.DataFrame") -> str:
    fractions = sorted(set(removal["fraction"]))
    rows = []
    for order, words in ORDERS.items():
        own = removal[removal["order"] == order].set_index("fraction")
        rows.append([words, *(interval(_interval(own.loc[fraction])) for fraction in fractions)])
    n = int(removal["n"].iloc[0])
    return f"{table(['order', *(f'{fraction:.0%}' for fraction in fractions)], rows)}\n\nn = {count(n, 'window')}."


def _interval(row: "pd.Series | dict") -> Interval:
    return Interval(row["difference"], row["low"], row["high"], int(row["n"]))


def _outcomes(found: Record) -> str:
    return (
        f"{found['worse']} raise NLL, {found['better']} lower it and for {found['no_difference_shown']} no difference "
        f"is shown (p corrected by Holm, below {SIGNIFICANT})"
    )


def _worst(rows: "pd.DataFrame", title: str, name: object) -> str:
    worst = rows.sort_values("difference", ascending=False, kind="stable").head(SHOWN)
    cells = [
        [
            name(row),
            interval(_interval(row)).removesuffix(f" {verdict(_interval(row))}"),
            f"{row['p_holm']:.2g}",
            corrected_verdict(row["difference"], row["p_holm"]),
        ]
        for _, row in worst.iterrows()
    ]
    return table([title, "NLL - NLL at A = 1 [95 %]", "p, corrected", "verdict"], cells)
