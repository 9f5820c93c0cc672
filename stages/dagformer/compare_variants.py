"""Compares the variants on the same held-out windows: primary questions, differences, and the spread over seeds.

    python stages/dagformer/compare_variants.py

Reads   data/dagformer/{train,eval}/<id>/ of every variant in params.yaml, data/dagformer/sensitivity/summary.json
Writes  data/dagformer/comparisons.json   primary, see `comparisons.primary_answers`; seeds, see `seed_spread`
        reports/dagformer/variants.csv    a row for each variant, protocol and mode, see `comparisons.differences`;
            and what its gates are like, see `GATES`
        reports/dagformer/P1.csv          P1's validations, for `dvc plots`
"""

from dynaroute.analysis.comparisons import differences, primary_answers, seed_spread
from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_csv, write_json, write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer.results import CONTROL, DATA, MAIN, REPORTS, read_results
from dynaroute.reporting.inputs import read_record

GATES = ("mean_A", "density_hard", "seq_gate_frac", "hyp_gate_frac", "entropy_bits", "dead_heads")


def main(settings: Settings) -> None:
    """Compares, and writes."""
    results = read_results(settings)
    headroom = {"base": read_record(DATA / "sensitivity/summary.json")["all_closed"]["mean"]}
    known, methods = (read_record(DATA / f"planted/{name}.json") for name in ("known", "methods"))
    if known:
        headroom["planted"] = known["prefix"]["minus_own"]["mean"]["mean"]
    asked = settings.analysis.primary
    of_question = {key: headroom[settings.base_of(question.left[0])] for key, question in asked.items()}
    references = {name: results.reference(variant) for name, variant in results.variants.items()}
    for name in results.planted:  # what reads no text, else the first of them
        other = methods[name]["control"] or next(iter(results.planted))
        references[name] = None if other == name else other
    comparisons = {
        "primary": primary_answers(asked, results.nll, results.documents, of_question, settings.seed),
        "seeds": seed_spread(results.seeds(), results.nll),
        "control_seeds": seed_spread(results.seeds(CONTROL) if CONTROL in results.variants else {}, results.nll),
    }
    write_json(DATA / "comparisons.json", comparisons)
    rows = differences(references, results.nll, results.documents)
    for row in rows:  # the gates are the same in both modes
        found = (results.variants | results.planted)[row["variant"]].evaluation[row["protocol"]]
        row |= {key: found[key] for key in GATES}
    write_csv(REPORTS / "variants.csv", rows)
    write_text(REPORTS / f"{MAIN}.csv", (DATA / "train" / MAIN / "training.csv").read_text("utf-8"))


if __name__ == "__main__":
    run(main, __doc__)
