"""Writes the report of the DAGFormer half.

python stages/report_dagformer.py
"""

from dynaroute.artifacts import write_text
from dynaroute.config import Settings
from dynaroute.reporting.dagformer.analyses import read_analyses
from dynaroute.reporting.dagformer.measured import measured_page
from dynaroute.reporting.dagformer.report import page
from dynaroute.reporting.dagformer.results import read_measurements, read_results
from dynaroute.stage import run


def main(settings: Settings) -> None:
    """Reads all variants' results, and writes both pages."""
    results = read_results(settings)
    analyses, measurements = read_analyses(settings, results), read_measurements(results)
    write_text("reports/dagformer.md", page(results, analyses))
    write_text("reports/dagformer_measured.md", measured_page(results, measurements))


if __name__ == "__main__":
    run(main, __doc__)
