"""What the routers do: gate norms, load and balance loss by layer."""

from typing import TYPE_CHECKING, Any

from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.findings import COLLAPSED, SIGNIFICANT, Trend
from dynaroute.reporting.dwr.results import Results
from dynaroute.reporting.tables import count, figure, published, table

if TYPE_CHECKING:
    import pandas as pd


def routers(results: Results) -> str:
    """Gate norms, load and balance loss by layer."""
    router, reference = results.training.router, results.reference["gate_norms"]
    norms = findings.gate_norms_by_layer(router)
    load = findings.relative_load(router).groupby("layer")
    header = ["layer", "min norm", "max norm", "mean norm", "spread"]
    rows = [
        [
            str(layer),
            *(f"{row[column]:.3f}" for column in ("min", "max", "mean", "spread")),
            f"{least:.2f}",
            f"{most:.2f}",
        ]
        for (layer, row), least, most in zip(norms.iterrows(), load.min(), load.max(), strict=True)
    ]
    their_rows = [
        [str(row["layer"]), *(f"{row[column]:.3f}" for column in ("min", "max", "mean", "spread"))]
        for row in reference["rows"]
    ]
    return "\n\n".join(
        [
            "**Gate norms and load**, of the best checkpoint. The gate norm of an expert is the L2 norm of its row of "
            "the router's weight; spread is the largest less the smallest. Load is an expert's share of its layer's "
            "assignments on the validation split, in units of the uniform share.",
            table([*header, "least load", "most load"], rows),
            figure("figures/dwr_gate_norms.png", "Gate norms by layer: every expert, minimum, mean and maximum."),
            f"{spread_sentence(router)} Rule: a trend is one if Spearman's rank correlation of layer and spread "
            "would be at least as strong, in either direction, with the layers in random order less than "
            f"{SIGNIFICANT:.0%} of the time. The layers of one run are few, and one run is one draw.",
            f"{collapse_sentence(router)} Rule: collapsed is what has less than {COLLAPSED:g} of the uniform load. "
            "Judged by load, since a norm says nothing about how often an expert is chosen.",
            figure("figures/dwr_expert_load.png", "Load of every expert against the uniform share."),
            published(
                f"Gate norms at epoch {reference['epoch']} ({reference['source']}; "
                f"{results.reference['setting']}).\n\n{table(header, their_rows)}\n\n{_their_spread(reference)}"
            ),
            _balance(results),
        ]
    )


def spread_sentence(router: "pd.DataFrame") -> str:
    """Whether the spread of gate norms has a trend over layers."""
    spread = findings.gate_norms_by_layer(router)["spread"]
    trend = findings.depth_trend(spread)
    if trend is None:
        return "The spread of gate norms cannot have a trend over layers here: there are not two that differ."
    sentence = _trend(trend)
    return f"{sentence[0].upper()}{sentence[1:]} It is largest in layer {spread.idxmax()} ({spread.max():.3f})."


def _their_spread(reference: dict[str, Any]) -> str:
    import pandas as pd

    trend = findings.depth_trend(pd.Series([row["spread"] for row in reference["rows"]]))
    return f"They are described there as a spread that increases with depth. By our rule, {_trend(trend)}"


def _trend(trend: Trend) -> str:
    what = {1: "grows with depth", -1: "shrinks with depth", 0: "shows no clear trend with depth"}[trend.direction]
    return (
        f"the spread of gate norms {what}: rank correlation with the layer {trend.rank_correlation:+.2f} over "
        f"{count(trend.layers, 'layer')}, two-sided p = {trend.chance:.2g}"
        + (" (with so few layers, no order could pass)." if trend.too_few_layers else ".")
    )


def collapse_sentence(router: "pd.DataFrame") -> str:
    """Whether an expert has collapsed, and which."""
    load = findings.relative_load(router)
    collapsed = load[load < COLLAPSED]
    if collapsed.empty:
        layer, expert = load.idxmin()
        return (
            f"No expert has collapsed: the least used (layer {layer}, expert {expert}) has {load.min():.2f} of the "
            "uniform load."
        )
    named = ", ".join(
        f"layer {layer} expert {expert} ({value:.2f})" for (layer, expert), value in collapsed[:8].items()
    )
    more = f" and {len(collapsed) - 8} more" if len(collapsed) > 8 else ""
    return f"{len(collapsed)} of {count(len(load), 'expert')} collapsed: {named}{more}, in units of the uniform load."


def _balance(results: Results) -> str:
    curve, top_k = results.training.curve, results.run["config"]["top_k"]
    best = findings.course(curve).best
    trained = curve[curve["step"] > 0]
    rows = []
    for layer in results.training.router["layer"].unique():
        value, during = best[f"validation_balance_layer{layer}"], trained[f"train_balance_loss_layer{layer}"]
        rows.append([str(layer), f"{value:.4f}", f"{value * top_k:.4f}", f"{during.min():.4f}", f"{during.max():.4f}"])
    header = [
        "layer",
        "validation, divided by top_k (ideal 1)",
        f"validation, the loss's form (ideal {top_k})",
        "training, lowest",
        "training, highest",
    ]
    theirs = results.reference["balance_loss"]
    their_top_k = results.reference["configuration"]["top_k"]
    return "\n\n".join(
        [
            "**Balance loss** by layer: of the best checkpoint over the whole validation split, and the range of its "
            "means over the intervals of training, batch by batch.",
            table(header, rows),
            "The loss is `E * sum_e f_e * P_e`, where `f_e` is the number of assignments to expert e per token and "
            f"`P_e` its mean probability. Every token is assigned to top_k experts, so the `f_e` add up to {top_k} "
            f"and uniform routing gives {top_k} in that form, in which it is trained; divided by top_k it gives 1.",
            published(
                f"Between {theirs['lowest']:.1f} and {theirs['highest']:.1f} in every layer, throughout training, set "
                f"against an ideal of {theirs['stated_ideal']:.1f} ({theirs['source']}). That is the loss's form, in "
                f"which uniform routing gives {their_top_k}: divided by top_k, between "
                f"{theirs['lowest'] / their_top_k:.2f} and {theirs['highest'] / their_top_k:.2f}."
            ),
        ]
    )
