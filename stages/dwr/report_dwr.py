"""Writes the DWR report, and its parts of the summary and of the page of measurements.

    python stages/dwr/report_dwr.py

Reads   data/dwr/{train,export,cache,simulation,measured,run_results}/, reports/dwr/*.csv, reports/reference.yaml,
        data/tokens/NAME/metadata.json and data/inputs/corpora.NAME.source.json of the corpus of the run;
        reports/benchmarks/{moe.json,locality_*.csv} and benchmarks/dvc.lock where they were measured
Writes  reports/dwr.md          the same bytes on every run
        data/dwr/report/        summary.md and summary.json, the same bytes on every run; measured.md
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.measured import section
from dynaroute.reporting.dwr.page import read_results, summary, values
from dynaroute.reporting.dwr.results import DATA
from dynaroute.reporting.inputs import read_benchmark
from dynaroute.reporting.pages import render


def main(settings: Settings) -> None:
    """Reads the results, and writes what they say."""
    results = read_results(settings)
    found = values(results)
    text = section(results.cached.summary, read_benchmark("moe"), results.reference["timing"])
    write_text("reports/dwr.md", render("dwr.md", found))
    write_text(DATA / "report/summary.md", render("dwr_summary.md", found))
    write_json(DATA / "report/summary.json", summary(results))
    write_text(DATA / "report/measured.md", text)


if __name__ == "__main__":
    run(main, __doc__)
