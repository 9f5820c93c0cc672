"""Collects parts of both systems' reports: the summary, the main numbers, and the page of times and memory.

    python stages/summary/summarize.py

Reads   data/<system>/report/  summary.md, summary.json and measured.md of each system
        data/dwr/measured/training.json  for the machine
        data/inputs/scales.json  what other scales found
Writes  reports/summary.md     the page that everybody reads
        reports/summary.json   the metrics of `dvc metrics show`
        reports/measured.md
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.inputs import read_record
from dynaroute.reporting.pages import render

SYSTEMS = ("dagformer", "dwr")


def main(settings: Settings) -> None:
    """Reads the parts of every system's report, and writes them as one."""
    folders = {system: Path("data") / system / "report" for system in SYSTEMS}
    write_json("reports/summary.json", {name: read_record(folder / "summary.json") for name, folder in folders.items()})
    machine = read_record("data/dwr/measured/training.json")["machine"]
    shown = {"machine": ", ".join(f"{part} {value}" for part, value in machine.items())}
    shown["scales"] = read_record("data/inputs/scales.json")
    for page in ("summary.md", "measured.md"):
        shown["sections"] = [(folder / page).read_text("utf-8") for folder in folders.values()]
        write_text(f"reports/{page}", render(page, shown))


if __name__ == "__main__":
    run(main, __doc__)
