"""Draws the figures of the DAGFormer report.

    python stages/dagformer/plot_dagformer.py

Reads   data/dagformer/{train,eval}/<id>/ of the variants in params.yaml, data/dagformer/{analysis/P1,sensitivity}/,
        data/dagformer/{planted,train/planted}, data/dagformer/comparisons.json, reports/dagformer/variants.csv
Writes  reports/dagformer/{topology,edges_closed,planted}.png; without a planted base, the last one says so
"""

from dynaroute.config import Settings
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer import figures
from dynaroute.reporting.dagformer.page import best_planted
from dynaroute.reporting.dagformer.results import MAIN, REPORTS, read_analyses, read_comparisons, read_results


def main(settings: Settings) -> None:
    """Reads what the other stages found, and draws it."""
    results = read_results(settings)
    comparisons, analyses = read_comparisons(), read_analyses(settings)
    figures.plot_topology(MAIN, REPORTS / "topology.png")
    figures.plot_edges_closed(analyses, results, comparisons, REPORTS / "edges_closed.png")
    best = best_planted(results, analyses)
    recovered = None if best is None else figures.read_recovered(results.planted[best])
    figures.plot_planted(recovered, REPORTS / "planted.png")


if __name__ == "__main__":
    run(main, __doc__)
