"""Writes the report of the DWR half, and a page of what was measured.

    python stages/dwr/report_dwr.py

Reads   reports/dwr/, reports/reference.yaml, data/dwr/train/,
        data/tokens/NAME/metadata.json and data/raw/NAME.source.json of the corpus of the run;
        reports/benchmarks/moe.json and benchmarks/dvc.lock where it was measured
Writes  reports/dwr.md           the same bytes on every run
        reports/dwr_measured.md  times, speeds and memory
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.measured import measured_page
from dynaroute.reporting.dwr.report import page
from dynaroute.reporting.dwr.results import read_measurements, read_results


def main(settings: Settings) -> None:
    """Reads one run's results, and writes both pages."""
    results = read_results()
    measurements = read_measurements(results.run["run"])
    write_text("reports/dwr.md", page(results))
    write_text("reports/dwr_measured.md", measured_page(results.run, measurements, results.reference))


if __name__ == "__main__":
    run(main, __doc__)
