"""The sanity checks: S0, the dense baseline; S1, the start of training; S2, whether a gradient reaches the gates."""

from dynaroute.analysis.statistics import verdict
from dynaroute.reporting.dagformer import findings
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.findings import MOVED, WITHIN
from dynaroute.reporting.dagformer.results import MODES, Results, Variant
from dynaroute.reporting.dagformer.setup import base_name, health
from dynaroute.reporting.dagformer.topology import to_interval
from dynaroute.reporting.dagformer.wording import (
    budget,
    course,
    difference,
    knobs,
    metrics,
    published_steps,
    steps,
    to_baseline,
)
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, count, published, table


def dense_baseline(results: Results) -> str:
    """S0: the NLL of the base, and what is left of it without connections between layers."""
    base, theirs = results.base, results.reference["dense_baseline"]
    evaluation, shared = results.main.evaluation, results.setup
    rows = [
        ["Base", base_name(shared["base"]), NONE],
        [
            f"**NLL_base**, {results.num_windows:,} held-out windows of {shared['seq_len']:,} tokens",
            f"**{evaluation['window']['nll_baseline']:.4f}**",
            f"{theirs['nll_base']:.4f}",
        ],
        [
            f"NLL_base of their tokens after the first {shared['prefix_tokens']:,} (prefix protocol)",
            f"{evaluation['prefix']['nll_baseline']:.4f}",
            NONE,
        ],
        [f"NLL, {base['n']:,} validation windows, every gate 1", f"{base['nll_all_gates_one']:.4f}", NONE],
        ["NLL, the same windows, every gate 0", f"{base['nll_all_gates_zero']:.4f}", NONE],
        ["Unigram entropy of the validation split", f"{base['unigram_entropy']:.4f}", NONE],
    ]
    same = count(len(results.variants), "variant")
    return "\n\n".join(
        [
            table(["item", "this run", f"published ({theirs['source']})"], rows),
            "NLL is in nats per token, everywhere in this report. In the baseline every gate is 1, which is the base "
            f"as it is. It was checked to be the same number for {same}, window by window.",
            wiring_sentence(results),
        ]
    )


def wiring_sentence(results: Results) -> str:
    """How much the connections that the predictor gates matter to the base."""
    base = results.base
    rise = to_interval(base["zero_minus_one"])
    words = {"worse": "matter", "better": "do harm", "no difference shown": "are not shown to matter"}[verdict(rise)]
    return (
        f"Connections between heads of different layers {words} to this base: without any, NLL of validation windows "
        f"is {base['nll_all_gates_zero']:.4f} in place of {base['nll_all_gates_one']:.4f} "
        f"({rise.mean / base['nll_all_gates_one']:+.1%}; {difference(rise)})."
    )


def identity_init(results: Results, analyses: Analyses, variant: Variant) -> str:
    """S1: does the predictor begin as the dense model, and stay close to it?"""
    theirs = results.reference["identity_init"]
    final = variant.evaluation["window"]
    largest = {
        mode: (variant.curve[f"validation_nll_{mode}"] / variant.curve["validation_nll_baseline"] - 1).abs().max()
        for mode in MODES
    }
    rows = [
        ["Config", knobs(variant.knobs), _config(theirs)],
        ["Tokens", budget(results, variant), f"about {theirs['tokens']:,} ({theirs['steps']:,} steps)"],
        ["Target", f"NLL within {WITHIN:.0%} of the baseline, in both modes", f"within {WITHIN:.0%}"],
        ["**Result**", f"**{outcome(variant)}**", "PASS"],
        *(
            [
                f"nll_{mode}",
                f"{final[f'nll_{mode}']:.4f} ({findings.relative(variant, mode):+.2%})",
                _their_nll(theirs, mode),
            ]
            for mode in MODES
        ),
        ["nll_baseline", f"{final['nll_baseline']:.4f}", f"{theirs['nll_base']:.4f}"],
        *([key, f"{final[key]:.3f}", f"{theirs[key]:.3f}"] for key in ("mean_A", "seq_gate_frac", "hyp_gate_frac")),
    ]
    return "\n\n".join(
        [
            table(["item", "this run", f"published ({theirs['source']})"], rows),
            f"{identity_sentence(variant)} Paired differences: {to_baseline(variant, analyses)}.",
            "By step, on validation windows:",
            steps(variant, "train_loss"),
            "Farthest from the baseline at any validation: "
            + ", ".join(f"{value:.2%} in {mode} mode" for mode, value in largest.items())
            + ".",
            published(
                f"By step ({theirs['source']}; about {theirs['hours']:g} h on {theirs['hardware']}):\n\n"
                f"{published_steps(theirs['rows'])}\n\nAt step {theirs['dip']['step']:,} a transient dip: nll_soft "
                f"{theirs['dip']['nll_soft']:.3f}, mean_A {theirs['dip']['mean_A']:.3f}."
            ),
        ]
    )


def outcome(variant: Variant) -> str:
    """Of S1's criterion."""
    return "PASS" if findings.reproduces_baseline(variant) else "FAIL"


def identity_sentence(variant: Variant) -> str:
    """S1's outcome with the numbers that it rests on."""
    away = " and ".join(f"{findings.relative(variant, mode):+.2%} ({mode})" for mode in MODES)
    return f"{outcome(variant)}: final NLL is {away} away from the baseline."


def gradient_flow(results: Results, analyses: Analyses, variant: Variant) -> str:
    """S2: does a gradient reach the gates, and does the predictor learn from it?"""
    theirs = results.reference["gradient_flow"]
    rows = [
        ["Config", knobs(variant.knobs), _config(theirs)],
        ["Tokens", budget(results, variant), f"about {theirs['tokens']:,} ({theirs['steps']:,} steps)"],
        ["Target", "NLL below the baseline", "NLL below the baseline"],
        [
            "**Result**",
            f"**{'met' if findings.better_modes(variant, analyses, 'window') else 'not shown'}**",
            "running",
        ],
        ["Training", health(variant), NONE],
    ]
    columns = ("train_loss", "train_gate_gradient", "train_gate_slope", "validation_density_hard")
    return "\n\n".join(
        [
            table(["item", "this run", f"published ({theirs['source']})"], rows),
            f"{flow_sentence(analyses, variant)} Paired differences: {to_baseline(variant, analyses)}. Rules: the "
            "target is met in a mode that the corrected test shows to be better, by the window protocol; gates have "
            f"left their initialisation if mean_A or hard density changed by more than {MOVED:g}.",
            f"Training was {variant.training['verdict']}: {variant.training['verdict_reason']}.",
            metrics(variant),
            "By step, on validation windows. Gradient is the norm of the gradient of a window's loss at its gates A "
            "(root mean square over windows), and slope the mean dA/dZ by which it goes on to their logits Z; both are "
            "means over the steps since the previous row.",
            steps(variant, *columns),
            published(
                f"By step ({theirs['source']}):\n\n{published_steps(theirs['rows'])}\n\nTrain NLL of single "
                f"batches: {theirs['train_nll'][0]:g} to {theirs['train_nll'][1]:g}. Ours above is a mean over steps."
            ),
        ]
    )


def flow_sentence(analyses: Analyses, variant: Variant) -> str:
    """S2's outcome, and whether its gates went anywhere."""
    modes = findings.better_modes(variant, analyses, "window")
    target = f"met in {' and '.join(modes)} mode" if modes else "not shown to be met"
    moved = "left their initialisation" if findings.gates_moved(variant) else "stayed at their initialisation"
    first, last = variant.curve.iloc[0], variant.curve.iloc[-1]
    return (
        f"NLL below the baseline: {target}. The gates {moved}: mean_A went from {first['validation_mean_A']:.3f} to "
        f"{last['validation_mean_A']:.3f}, hard density from {first['validation_density_hard']:.3f} to "
        f"{last['validation_density_hard']:.3f}."
    )


def _config(theirs: Record) -> str:
    tau = course(theirs["tau_init"], theirs["tau_final"])
    return f"r={theirs['rank']}, tau={tau}, k={theirs['cascade_k']}, lambda={theirs['lambda']}"


def _their_nll(theirs: Record, mode: str) -> str:
    nll = theirs[f"nll_{mode}"]
    return f"{nll:.4f} ({nll / theirs['nll_base'] - 1:+.1%})"
