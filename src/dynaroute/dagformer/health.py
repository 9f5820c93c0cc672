"""Whether the training of a variant is healthy, from the rows of its validations."""

import itertools
import math
from typing import Any

from dynaroute.config.dagformer import Variant

COLLAPSED_DENSITY = 0.01  # of hard gates
SATURATED_SLOPE = 1e-3  # mean dA/dZ; at Z = 15 it is about 9e-3 at tau 5, 4e-4 at tau 2, 4e-6 at tau 1
SURELY_OPEN = 2.0  # an init_logit; logits start around it with a standard deviation of 0.1
NEARLY_OPEN = 0.8  # soft gates


def health(history: list[dict[str, Any]], alarm_steps: int) -> tuple[str, str]:
    """Whether a run is healthy, saturated, collapsed or too short to tell, and the reason in one sentence.

    saturated: the mean gate slope stayed below SATURATED_SLOPE for `alarm_steps` steps. A validation's row holds the
        mean since the previous row, so one row is enough if it covers that many steps.
    collapsed: hard density stayed below COLLAPSED_DENSITY for `alarm_steps` steps. A row holds the density at its own
        step only, so this takes two rows; density counts as low between two consecutive low rows.
    too short to tell: the run has fewer than `alarm_steps` steps.
    """
    moments, intervals = zip(history, history, strict=True), itertools.pairwise(history)  # what a row's value covers
    rules = (
        ("collapsed", "validation_density_hard", moments, COLLAPSED_DENSITY, "hard density"),
        ("saturated", "train_gate_slope", intervals, SATURATED_SLOPE, "the mean slope dA/dZ of the gates"),
    )
    seen = []
    for name, key, spans, threshold, words in rules:
        start, longest = None, None
        for begin, row in spans:
            if row[key] >= threshold:
                start = None
                continue
            start = begin["step"] if start is None else start
            longest = max(longest or 0, row["step"] - start)
            if longest >= alarm_steps:
                return name, f"{words} was below {threshold:g} from step {start} to {row['step']} or longer"
        if longest is not None:
            stretch = f"for {longest} steps in a row" if longest else "at single validations only"
            seen.append(f"{words} was below {threshold:g} {stretch}")
    if history[-1]["step"] - history[0]["step"] < alarm_steps:
        return "too short to tell", f"an alarm takes {alarm_steps} steps"
    if seen:
        return "healthy", f"{' and '.join(seen)}, and an alarm takes {alarm_steps} steps"
    return "healthy", "hard density and the slope of the gates stayed above their alarm thresholds"


def alarm(history: list[dict[str, Any]], alarm_steps: int) -> str:
    """The alarm that a run raises, or an empty string."""
    found, reason = health(history, alarm_steps)
    return f"alarm: {found}: {reason}" if found in ("collapsed", "saturated") else ""


def checks_before_training(variant: Variant, row: dict[str, Any]) -> dict[str, bool]:
    """That gates which a new predictor leaves open change nothing, from the validation before the first step.

    Empty where that is not so by design: gates that do not all start open, a layer 0 that the cascade shuts, or an
    input norm that changes what open gates let through.
    """
    if variant.init_logit < SURELY_OPEN or variant.target_density or variant.input_norm not in ("none", "gate_mean"):
        return {}
    if variant.cascade != "off" and not variant.exempt_first_layer:
        return {}
    soft, hard, dense = (row[f"validation_nll_{mode}"] for mode in ("soft", "hard", "baseline"))
    checks = {"hard_nll_is_the_baseline_before_training": abs(hard - dense) < 1e-5}
    if 1 / (1 + math.exp(-variant.init_logit / variant.tau_init)) > NEARLY_OPEN:
        checks["soft_nll_is_within_1_percent_of_the_baseline_before_training"] = abs(soft / dense - 1) < 0.01
    return checks
