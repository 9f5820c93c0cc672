"""Writes the page that compares the DWR runs, with its figures.

    python stages/dwr/report_dwr_runs.py

Reads   data/dwr/run_results/, reports/reference.yaml, reports/benchmarks/balance.json if it is there
Writes  reports/dwr_runs.md, reports/dwr/{training_curves,gate_norms,runs}.png
        reports/dwr/losses.csv  the training loss of every tenth step of the reference
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_csv, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr import figures
from dynaroute.reporting.dwr.results import REFERENCE, REPORTS, read_benchmark
from dynaroute.reporting.dwr.runs import differing_in, page, read_runs, sweep
from dynaroute.reporting.inputs import read_record


def main(settings: Settings) -> None:
    """Reads the results, draws the figures and writes the page."""
    runs = read_runs(settings)
    seeds = differing_in(runs, "seed")
    text = page(runs, read_benchmark("balance"), read_record(REFERENCE)["dwr"])
    write_csv(REPORTS / "losses.csv", runs[0]["losses"])
    figures.plot_training(seeds, REPORTS / "training_curves.png")
    figures.plot_gate_norms(runs[0], REPORTS / "gate_norms.png")
    figures.plot_runs(sweep(runs), seeds, REPORTS / "runs.png")
    write_text("reports/dwr_runs.md", text)


if __name__ == "__main__":
    run(main, __doc__)
