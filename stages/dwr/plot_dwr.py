"""Draws the figures of the DWR report.

    python stages/dwr/plot_dwr.py

Reads   reports/dwr/*.csv, data/dwr/train/
Writes  reports/dwr/{routers,hit_rates}.png  the same bytes on every run
"""

from dynaroute.config import Settings
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr import figures
from dynaroute.reporting.dwr.results import REPORTS, read_hits, read_training


def main(settings: Settings) -> None:
    """Reads what the other stages found, and draws it."""
    training = read_training()
    figures.plot_routers(training.router, training.run["config"]["d_model"], REPORTS / "routers.png")
    figures.plot_hit_rates(read_hits(), len(training.router), REPORTS / "hit_rates.png")


if __name__ == "__main__":
    run(main, __doc__)
