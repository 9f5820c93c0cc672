"""Writes the report on cached inference.

    python stages/dwr/report_cached_inference.py

Reads   data/dwr/{export,cache,simulation}/, reports/dwr/simulated_hits.csv, and
        reports/benchmarks/cached_inference.json where it was measured
Writes  reports/cached_inference.md
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.cached_inference import page
from dynaroute.reporting.dwr.results import read_benchmark, read_cached


def main(settings: Settings) -> None:
    """Reads the results, and writes the page."""
    write_text("reports/cached_inference.md", page(read_cached(), read_benchmark("cached_inference")))


if __name__ == "__main__":
    run(main, __doc__)
