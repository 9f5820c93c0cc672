"""Draws the figures of the DWR report, and copies the losses that `dvc plots` shows.

    python stages/dwr/plot_dwr.py

Reads   reports/dwr/simulated_hits.csv, data/dwr/{export/summary.json,run_results};
        reports/benchmarks/locality_reference.csv if it was measured
Writes  reports/dwr/{training_curves,gate_norms,runs,hit_rates}.png  the same bytes on every run
        reports/dwr/losses.csv  the training loss of every tenth step of the reference
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_csv
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr import figures
from dynaroute.reporting.dwr.findings import differing_in, sweep
from dynaroute.reporting.dwr.results import DATA, REPORTS, read_hits, read_locality, read_runs
from dynaroute.reporting.inputs import read_record


def main(settings: Settings) -> None:
    """Reads what the other stages found, and draws it."""
    runs, experts = read_runs(settings), read_record(DATA / "export/summary.json")["expert_files"]
    seeds = differing_in(runs, "seed")
    write_csv(REPORTS / "losses.csv", runs[0]["losses"])
    figures.plot_training(seeds, REPORTS / "training_curves.png")
    figures.plot_gate_norms(runs[0], REPORTS / "gate_norms.png")
    locality = read_locality("reference", runs[0]["run"])
    figures.plot_runs(sweep(runs), seeds, locality, REPORTS / "runs.png")
    figures.plot_hit_rates(read_hits(), experts, REPORTS / "hit_rates.png")


if __name__ == "__main__":
    run(main, __doc__)
