"""What the numbers of DAGFormer runs say, by rules that are written down here and printed with every finding.

A rule has an answer for each outcome. Whether a difference is one is the corrected verdict of `compare_variants`.
"""

from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import MODES, Variant

WITHIN = 0.01  # S1's criterion, as published: NLL within 1 % of the baseline
MOVED = 0.01  # gates have left their initialisation if mean_A or hard density changed by more than this


def relative(variant: Variant, mode: str) -> float:
    """How far a mode's NLL is from the baseline's, as a share of it; window protocol."""
    return variant.nll(mode, "window") / variant.nll("baseline", "window") - 1


def reproduces_baseline(variant: Variant) -> bool:
    """Whether both modes are within S1's criterion."""
    return all(abs(relative(variant, mode)) <= WITHIN for mode in MODES)


def better_modes(variant: Variant, analyses: Analyses, protocol: str) -> list[str]:
    """The modes in which a variant is shown to beat the baseline, corrected for all variants' being tried."""
    return [mode for mode in MODES if analyses.verdict("baseline", variant.name, mode, protocol) == "better"]


def gates_moved(variant: Variant) -> bool:
    """Whether training took the gates away from where they started."""
    first, last = variant.curve.iloc[0], variant.curve.iloc[-1]
    return any(abs(last[key] - first[key]) > MOVED for key in ("validation_mean_A", "validation_density_hard"))
