"""Writes the DWR report, its section on the page of measurements, and its numbers in the summary.

    python stages/dwr/report_dwr.py

Reads   data/dwr/{train,export,cache,simulation,measured}/, reports/dwr/*.csv, reports/reference.yaml,
        data/tokens/NAME/metadata.json and data/inputs/corpora.NAME.source.json of the corpus of the run;
        reports/benchmarks/moe.json and benchmarks/dvc.lock where it was measured
Writes  reports/dwr.md          the same bytes on every run
        data/dwr/report/        summary.json, the same bytes on every run; measured.md: times, speeds and memory
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.measured import section
from dynaroute.reporting.dwr.report import page, read_results, summary
from dynaroute.reporting.dwr.results import DATA, read_benchmark, read_measurements


def main(settings: Settings) -> None:
    """Reads one run's results, and writes what they say."""
    results = read_results()
    measured = read_measurements(results.training.run["run"])
    text = section(measured, results.cached.summary, read_benchmark("moe"), results.reference["timing"])
    write_text("reports/dwr.md", page(results))
    write_json(DATA / "report/summary.json", summary(results))
    write_text(DATA / "report/measured.md", text)


if __name__ == "__main__":
    run(main, __doc__)
