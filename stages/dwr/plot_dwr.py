"""Draws the figures of the DWR report.

    python stages/dwr/plot_dwr.py

Reads   reports/dwr/
Writes  reports/figures/dwr_{training_curves,gate_norms,expert_load,cache_hit_rate}.png  the same bytes on every run
        reports/figures/measured/dwr_cache_speed.png                                     a measurement
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr import figures
from dynaroute.reporting.dwr.results import read_simulated_hits, read_speeds, read_training

FIGURES = Path("reports/figures")


def main(settings: Settings) -> None:
    """Reads what the other stages found, and draws it."""
    training = read_training()
    _, cells = read_speeds()
    num_experts = len(training.router)
    figures.plot_training(training.curve, training.summary, FIGURES / "dwr_training_curves.png")
    figures.plot_gate_norms(training.router, FIGURES / "dwr_gate_norms.png")
    figures.plot_expert_load(training.router, FIGURES / "dwr_expert_load.png")
    figures.plot_hit_rates(read_simulated_hits(), num_experts, FIGURES / "dwr_cache_hit_rate.png")
    figures.plot_speed(cells, num_experts, FIGURES / "measured/dwr_cache_speed.png")


if __name__ == "__main__":
    run(main, __doc__)
