"""Writes the page that compares the DWR runs, and its figure.

    python stages/dwr/report_dwr_runs.py

Reads   data/dwr/run_results/
Writes  reports/dwr_runs.md, reports/dwr/runs.png
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.figures import plot_runs
from dynaroute.reporting.dwr.runs import page, read_runs, sweep


def main(settings: Settings) -> None:
    """Reads the results, draws the figure and writes the page."""
    runs = read_runs(settings)
    plot_runs(sweep(runs), "reports/dwr/runs.png")
    write_text("reports/dwr_runs.md", page(runs))


if __name__ == "__main__":
    run(main, __doc__)
