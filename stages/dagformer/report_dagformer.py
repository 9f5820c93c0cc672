"""Writes the report of the DAGFormer half, and a page of what was measured.

    python stages/dagformer/report_dagformer.py

Reads   reports/dagformer/base.json; of every variant in params.yaml reports/dagformer/<id>/
        {training.json,training.csv,nll.json,nll.csv} and data/dagformer/<id>/run.json
        reports/dagformer_measured/{base,<id>}.json
        reports/dagformer/<id>/topology.json of the variants analysed; reports/dagformer/{sensitivity.json,
        gate_gradients.csv,removal.csv,removal_layer_pairs.csv,removal_heads.csv}
        reports/statistics/{comparisons.csv,seeds.json}, reports/reference.yaml,
        data/tokens/<dagformer.corpus>/metadata.json;
        reports/benchmarks/dag.json and benchmarks/dvc.lock where it was measured
Writes  reports/dagformer.md           the same bytes on every run
        reports/dagformer_measured.md  times, speeds and memory
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer.analyses import read_analyses
from dynaroute.reporting.dagformer.measured import measured_page
from dynaroute.reporting.dagformer.report import page
from dynaroute.reporting.dagformer.results import read_measurements, read_results


def main(settings: Settings) -> None:
    """Reads all variants' results, and writes both pages."""
    results = read_results(settings)
    analyses, measurements = read_analyses(settings, results), read_measurements(results)
    write_text("reports/dagformer.md", page(results, analyses))
    write_text("reports/dagformer_measured.md", measured_page(results, measurements))


if __name__ == "__main__":
    run(main, __doc__)
