"""Draws the figures of the DAGFormer report.

    python stages/dagformer/plot_dagformer.py

Reads   data/dagformer/{train,eval}/<id>/ of the variants in params.yaml, data/dagformer/{analysis/P1,sensitivity}/,
        data/dagformer/comparisons.json, reports/dagformer/variants.csv
Writes  reports/dagformer/{wiring,distances,nll_by_step,gate_gradients,variants,edges_closed}.png
"""

import textwrap

from dynaroute.config import Settings
from dynaroute.dagformer.health import SATURATED_SLOPE
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer import figures
from dynaroute.reporting.dagformer.page import card
from dynaroute.reporting.dagformer.results import MAIN, REPORTS, read_analyses, read_comparisons, read_results

CURVES = ("S1", "S2", "P1", "P2", "L0", "C1")  # with a panel for each
TEMPERATURES = ("S1", "S2", "P1", "P2", "A5", "A6", "A7")  # whose gates differ in temperature


def main(settings: Settings) -> None:
    """Reads what the other stages found, and draws it."""
    results = read_results(settings)
    comparisons, analyses = read_comparisons(results), read_analyses(settings, results)
    wirings = figures.read_wirings(MAIN)
    curves = {name: variant.curve for name, variant in results.variants.items()}
    changes = {name: card(results, comparisons, variant)["changes"] for name, variant in results.variants.items()}
    labels = {name: f"{name}: {change}" if change else name for name, change in changes.items()}
    labels = {name: textwrap.shorten(label, 34, placeholder=" …") for name, label in labels.items()}
    figures.plot_wiring(wirings, REPORTS / "wiring.png")
    figures.plot_distances(wirings, REPORTS / "distances.png")
    figures.plot_nll({name: curves[name] for name in CURVES if name in curves}, REPORTS / "nll_by_step.png")
    named = [name for name in TEMPERATURES if name in curves]
    figures.plot_gate_gradients(curves, named, SATURATED_SLOPE, REPORTS / "gate_gradients.png")
    figures.plot_variants(comparisons, labels, REPORTS / "variants.png")
    figures.plot_edges_closed(analyses.removal, results.variants, comparisons, REPORTS / "edges_closed.png")


if __name__ == "__main__":
    run(main, __doc__)
