"""Collects parts of both systems' reports: the main numbers, and the page of times and memory.

    python stages/summary/summarize.py

Reads   data/<system>/report/  summary.json and measured.md of each system
Writes  reports/summary.json   the metrics of `dvc metrics show`
        reports/measured.md
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.inputs import read_record
from dynaroute.reporting.pages import render

SYSTEMS = ("dwr", "dagformer")


def main(settings: Settings) -> None:
    """Reads the parts of every system's report, and writes them as one."""
    folders = {system: Path("data") / system / "report" for system in SYSTEMS}
    write_json("reports/summary.json", {name: read_record(folder / "summary.json") for name, folder in folders.items()})
    sections = [(folder / "measured.md").read_text("utf-8") for folder in folders.values()]
    write_text("reports/measured.md", render("measured.md", {"sections": sections}))


if __name__ == "__main__":
    run(main, __doc__)
