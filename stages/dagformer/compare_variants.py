"""Compares the variants on the same held-out windows: primary questions, differences, and the spread over seeds.

    python stages/dagformer/compare_variants.py

Reads   data/dagformer/{train,eval}/<id>/ of every variant in params.yaml, data/dagformer/sensitivity/summary.json
Writes  data/dagformer/comparisons.json   primary, see `comparisons.primary_answers`; seeds, see `seed_spread`;
            headroom: what closing all gates costs the base, in nats per token
        reports/dagformer/variants.csv    a row for each variant, protocol and mode, see `comparisons.differences`
        reports/dagformer/P1.csv          P1's validations, for `dvc plots`
"""

from dynaroute.analysis.comparisons import differences, primary_answers, seed_spread
from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_csv, write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer.results import DATA, MAIN, REPORTS, read_results
from dynaroute.reporting.inputs import read_record


def main(settings: Settings) -> None:
    """Compares, and writes."""
    results = read_results(settings)
    headroom = read_record(DATA / "sensitivity/summary.json")["all_closed"]["mean"]
    primary = primary_answers(settings.analysis.primary, results.nll, results.documents, headroom, settings.seed)
    references = {name: results.reference(variant) for name, variant in results.variants.items()}
    comparisons = {"primary": primary, "seeds": seed_spread(results.seeds(), results.nll), "headroom": headroom}
    write_json(DATA / "comparisons.json", comparisons)
    write_csv(REPORTS / "variants.csv", differences(references, results.nll, results.documents))
    write_text(REPORTS / f"{MAIN}.csv", (DATA / "train" / MAIN / "training.csv").read_text("utf-8"))


if __name__ == "__main__":
    run(main, __doc__)
