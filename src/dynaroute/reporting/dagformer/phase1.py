"""Phase 1: P1, the default configuration, and P2, which goes on from its end."""

from dynaroute.analysis.statistics import Interval
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import MODES, PROTOCOLS, Results, Variant
from dynaroute.reporting.dagformer.setup import health
from dynaroute.reporting.dagformer.wording import budget, interval, knobs, metrics, numbers, steps, to_baseline
from dynaroute.reporting.tables import count, figure, published, table

COURSE = ("train_loss", "validation_density_hard", "validation_tau", "validation_lambda")


def default(results: Results, analyses: Analyses) -> str:
    """P1."""
    variant = results.main
    return "\n\n".join(
        [
            _items(results, variant),
            default_sentence(variant, analyses),
            metrics(variant),
            "By step, on validation windows:",
            steps(variant, *COURSE),
            figure(
                "figures/dagformer_nll_by_step.png",
                "Validation NLL by step in the three modes; every panel has a scale of its own.",
            ),
            figure("figures/dagformer_schedules.png", "Temperature and lambda by step, as recorded at validations."),
            figure(
                "figures/dagformer_adjacency.png",
                f"Mean adjacency of P1 over {results.num_windows:,} held-out windows. Rows send, columns receive.",
            ),
            figure("figures/dagformer_density_by_layer_pair.png", "Mean gate of P1 from layer to layer."),
            figure(
                "figures/dagformer_gate_gradients.png",
                "Norm of the gradient of a window's loss at its gates A, and mean slope dA/dZ before the cascade.",
            ),
            published("P1 and P2 were not started there."),
        ]
    )


def default_sentence(variant: Variant, analyses: Analyses) -> str:
    """How P1 ends."""
    density = variant.evaluation["window"]["density_hard"]
    return f"P1 ends with {density:.1%} of its hard gates open. Against the baseline: {to_baseline(variant, analyses)}."


def extended(results: Results, analyses: Analyses, variant: Variant) -> str:
    """P2."""
    start = results.variants.get(variant.run["from"])
    parts = [_items(results, variant)]
    if start is not None:
        rows = [
            [protocol, mode, interval(variant.minus(start, mode, protocol))] for protocol in PROTOCOLS for mode in MODES
        ]
        header = ["protocol", "mode", f"{variant.name} - {start.name}, NLL [95 %]"]
        parts += [extended_sentence(analyses, variant, start), table(header, rows)]
    return "\n\n".join([*parts, metrics(variant), "By step, on validation windows:", steps(variant, *COURSE)])


def extended_sentence(analyses: Analyses, variant: Variant, start: Variant) -> str:
    """Whether going on improved what it started from, and at which learning rate it did."""
    outcomes: dict[str, list[tuple[str, Interval]]] = {}  # by verdict
    for mode in MODES:
        found = variant.minus(start, mode, "window")
        words = analyses.verdict("reference", variant.name, mode, "window") or "not tested"  # of another budget
        outcomes.setdefault(words, []).append((mode, found))
    outcome = "; ".join(
        f"{words} in {' and '.join(mode for mode, _ in members)} mode: "
        + ", ".join(numbers(found) for _, found in members)
        for words, members in outcomes.items()
    )
    lr, warm_up = variant.knobs["lr"], variant.knobs["warmup_steps"]
    begins = f"rises to {lr:g} over {count(warm_up, 'step')}" if warm_up else f"begins at {lr:g}, without warm-up"
    return (
        f"Going on from {start.name}, at its final temperature and lambda, NLL against that of {start.name} (window "
        f"protocol): {outcome}. The learning-rate schedule starts anew at its full rate: it {begins}, where "
        f"{start.name}'s was to end at {start.knobs['min_lr']:g}."
    )


def _items(results: Results, variant: Variant) -> str:
    rows = [
        ["Config", knobs(variant.knobs)],
        ["Starts from", variant.run["from"]],
        ["Tokens", budget(results, variant)],
        ["Training", health(variant)],
    ]
    return table(["item", "this run"], rows)
