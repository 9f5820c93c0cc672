"""Writes the report on cached inference.

    python stages/dwr/report_cached_inference.py

Reads   data/dwr/{export,cache,simulation}/, reports/dwr/simulated_hits.csv, and
        reports/benchmarks/hub_moe.json where it was measured
Writes  reports/cached_inference.md
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.cached_inference import values
from dynaroute.reporting.dwr.results import read_cached
from dynaroute.reporting.inputs import read_benchmark
from dynaroute.reporting.pages import render


def main(settings: Settings) -> None:
    """Reads the results, and writes the page."""
    found = values(read_cached(), read_benchmark("hub_moe"))
    write_text("reports/cached_inference.md", render("cached_inference.md", found))


if __name__ == "__main__":
    run(main, __doc__)
