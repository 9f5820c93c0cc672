"""Writes the report on cached inference.

    python stages/dwr/report_cached_inference.py

Reads   reports/dwr/{export,cache,simulation}.json, reports/dwr/{cache,simulated_hits,simulated_speed}.csv, and
        reports/benchmarks/cached_inference.json where it was measured
Writes  reports/cached_inference.md
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.cached_inference import page, read_results


def main(settings: Settings) -> None:
    """Reads the results, and writes the page."""
    write_text("reports/cached_inference.md", page(read_results()))


if __name__ == "__main__":
    run(main, __doc__)
