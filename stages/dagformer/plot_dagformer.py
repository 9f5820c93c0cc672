"""Draws the figures of the DAGFormer report.

    python stages/dagformer/plot_dagformer.py

Reads   reports/dagformer/<id>/{training.csv,nll.json} of every variant in params.yaml; data/eval/P1, data/analysis/P1;
        what the analysis stages wrote into reports/dagformer
Writes  reports/figures/dagformer_{adjacency,density_by_layer_pair,nll_by_step,schedules,gate_gradients,variants}.png,
        reports/figures/dagformer_{topology_variance,domains,sensitivity,removal}.png
"""

from pathlib import Path

from dynaroute.analysis.topology import by_layer_pair
from dynaroute.config import Settings
from dynaroute.dagformer.objective import SATURATED_SLOPE
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer import analysis_figures, figures
from dynaroute.reporting.dagformer.analyses import read_analyses, read_wirings
from dynaroute.reporting.dagformer.results import (
    REFERENCE_VARIANT,
    check_has_main,
    read_curve,
    read_evaluation,
    read_mean_gates,
    read_results,
)

FIGURES = Path("reports/figures")
CURVES = ("S1", "S2", "P1", "P2", "L0", "C1")  # with a panel for each
TEMPERATURES = ("S1", "S2", "P1", "P2", "A5", "A6", "A7")  # whose gates differ in temperature


def main(settings: Settings) -> None:
    """Reads what the other stages found, and draws it."""
    check_has_main(settings)
    curves = {name: read_curve(name) for name in settings.variants}
    evaluations = {name: read_evaluation(name) for name in settings.variants}
    soft, hard, heads = read_mean_gates(REFERENCE_VARIANT)
    by_layer = [by_layer_pair(gates, heads).numpy() for gates in (soft, hard)]

    def steps_before(name: str) -> int:
        start = settings.variants[name]["from"]
        return 0 if start == "base" else steps_before(start) + int(curves[start]["step"].iloc[-1])

    starts = {name: steps_before(name) for name in curves}
    shown = {name: curves[name] for name in CURVES if name in curves}
    named = [name for name in TEMPERATURES if name in curves]
    figures.plot_adjacency(soft.numpy(), hard.numpy(), heads, FIGURES / "dagformer_adjacency.png")
    figures.plot_density(*by_layer, FIGURES / "dagformer_density_by_layer_pair.png")
    figures.plot_nll(shown, FIGURES / "dagformer_nll_by_step.png")
    figures.plot_schedules(curves, starts, FIGURES / "dagformer_schedules.png")
    figures.plot_gate_gradients(curves, named, SATURATED_SLOPE, FIGURES / "dagformer_gate_gradients.png")
    figures.plot_variants(evaluations, FIGURES / "dagformer_variants.png")

    analyses, wirings = read_analyses(settings, read_results(settings)), read_wirings(REFERENCE_VARIANT)
    analysis_figures.plot_variance(wirings, FIGURES / "dagformer_topology_variance.png")
    analysis_figures.plot_domains(wirings, FIGURES / "dagformer_domains.png")
    analysis_figures.plot_sensitivity(analyses, FIGURES / "dagformer_sensitivity.png")
    analysis_figures.plot_removal(analyses, FIGURES / "dagformer_removal.png")


if __name__ == "__main__":
    run(main, __doc__)
