"""Writes the report of the DWR half, and a page of what was measured.

    python stages/report_dwr.py

in:  reports/dwr/, reports/reference.yaml, data/dwr/train/, data/dwr/expert_store/manifest.json,
     data/tokens/NAME/metadata.json and data/raw/NAME.source.json of the corpus of the run
out: reports/dwr.md           the same bytes on every run
     reports/dwr_measured.md  times, speeds and memory
"""

from dynaroute.artifacts import write_text
from dynaroute.config import Settings
from dynaroute.reporting.dwr.report import page
from dynaroute.reporting.dwr.results import read_results
from dynaroute.stage import run


def main(settings: Settings) -> None:
    """Reads one run's results, and writes both pages."""
    results = read_results()
    write_text("reports/dwr.md", page(results))


if __name__ == "__main__":
    run(main, __doc__)
