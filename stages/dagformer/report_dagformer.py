"""Writes the DAGFormer report, and its parts of the summary and of the page of measurements.

    python stages/dagformer/report_dagformer.py

Reads   data/dagformer/{train,eval,analysis}/<id>/ of the variants in params.yaml,
        data/dagformer/{measured,planted,sensitivity}/, data/dagformer/{base,comparisons}.json,
        reports/dagformer/variants.csv, reports/reference.yaml, data/tokens/<dagformer.corpus>/metadata.json;
        reports/benchmarks/{dag,stability}.json and benchmarks/dvc.lock, if they were run
Writes  reports/dagformer.md            the same bytes on every run
        reports/dagformer/primary.csv   the primary questions and their answers, as the page shows them
        data/dagformer/report/          summary.md, summary.json and measured.md, for the stage summarize
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_csv, write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer.measured import section
from dynaroute.reporting.dagformer.page import summary, values
from dynaroute.reporting.dagformer.results import DATA, read_analyses, read_comparisons, read_results
from dynaroute.reporting.inputs import read_benchmark, read_record
from dynaroute.reporting.pages import render


def main(settings: Settings) -> None:
    """Reads all variants' results, and writes the page and its parts of the others."""
    results = read_results(settings)
    comparisons, analyses = read_comparisons(), read_analyses(settings)
    tokens = read_record(Path("data/tokens") / settings.dagformer.corpus / "metadata.json")
    reference = read_record("reports/reference.yaml")["dagformer"]
    found = values(results, comparisons, analyses, tokens, reference, read_benchmark("stability"))
    write_text("reports/dagformer.md", render("dagformer.md", found))
    shown = ("question", "answer", "by", "interval", "detectable", "headroom")
    write_csv("reports/dagformer/primary.csv", [{key: row[key] for key in shown} for row in found["rows"]["primary"]])
    write_text(DATA / "report/summary.md", render("dagformer_summary.md", found))
    write_text(DATA / "report/measured.md", section(results, reference["timing"]))
    write_json(DATA / "report/summary.json", summary(results, comparisons, analyses))


if __name__ == "__main__":
    run(main, __doc__)
