"""reports/dagformer.md: the published report's structure, filled from the outputs of these runs.

Nothing here depends on time, machine or measured speed, so the page has the same bytes on every run; what does is on
the page of `measured.py`. Numbers of the reference appear in columns headed "published" and in quotations that begin
with "Published", and nowhere else.
"""

from dynaroute.analysis.statistics import SIGNIFICANT
from dynaroute.reporting.dagformer import ablations, comparisons, phase1, sanity, sensitivity, topology
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import MODES, PROTOCOLS, Results
from dynaroute.reporting.dagformer.setup import health_sentence, setup, variants
from dynaroute.reporting.dagformer.wording import by_verdict
from dynaroute.reporting.tables import count, figure, published, shared_text, table


def page(results: Results, analyses: Analyses) -> str:
    """The report as Markdown."""
    runs = results.variants
    parts = [
        "# DAGFormer: results",
        introduction(results),
        *("## At a glance", at_a_glance(results, analyses)),
        *("## 1. What was run", setup(results)),
        *("### Variants", variants(results)),
        "## 2. Sanity checks",
        *("### S0: dense baseline", sanity.dense_baseline(results)),
    ]
    if "S1" in runs:
        parts += [
            "### S1: the predictor starts as the dense model",
            sanity.identity_init(results, analyses, runs["S1"]),
        ]
    if "S2" in runs:
        parts += ["### S2: gradient flow", sanity.gradient_flow(results, analyses, runs["S2"])]
    parts += ["## 3. Phase 1", "### P1: default configuration", phase1.default(results, analyses)]
    if "P2" in runs:
        parts += ["### P2: extended", phase1.extended(results, analyses, runs["P2"])]
    parts += ["## 4. Ablations", ABLATIONS]
    for group in ablations.GROUPS:
        if ablations.present(results, group):
            parts += [f"### {group.title}", ablations.ablation(results, analyses, group)]
    if "L0" in runs:
        parts += [
            "### L0: the cascading gate without the exemption of layer 0",
            ablations.first_layer(results, analyses, runs["L0"]),
        ]
    if "C1" in runs:
        parts += ["### C1: one topology for all texts", ablations.control(results, analyses, runs["C1"])]
    if ablations.others(results):
        parts += ["### Other variants", ablations.other_variants(results)]
    parts += [
        *("## 5. Both protocols", protocols(results)),
        *("### What reading the answer is worth", topology.reading(analyses)),
        *("## 6. Analysis experiments", analysis_data(results), published("X1, X2 and X3 were not started there.")),
        *("### X1: topology variance", topology.variance(analyses)),
        *("### X2: domain-specific topology", topology.domains(analyses)),
        *("### X3: topology-NLL sensitivity", sensitivity.sensitivity(analyses)),
    ]
    if results.joint is not None:
        parts += ["## 7. Joint training of base and predictor", comparisons.joint(results, analyses)]
    parts += [
        *("## 8. Statistics", comparisons.statistics(results, analyses)),
        *("### Seeds", comparisons.seeds(analyses)),
        *("## 9. Validated properties", properties(results, analyses)),
        *("## 10. Known limitations", limitations(results)),
    ]
    return "\n\n".join(parts) + "\n"


def introduction(results: Results) -> str:
    """What the page is, and how to make it again."""
    reference = results.reference
    return (
        "A small predictor reads a text and wires the attention heads of a frozen language model into a DAG, trained "
        f"by language-modelling loss alone. {count(len(results.variants), 'variant')} of it were trained on one base "
        f"(run `{results.base['run']}`) and evaluated on the same held-out windows. Every number below is from those "
        f"runs, but for those marked as published, which are from *{reference['document']}* ({reference['setting']}) "
        "and stand beside ours for comparison.\n\n"
        "How to reproduce: `make repro`, or `dvc repro report_dagformer`. On the same kind of CPU, the same settings "
        "and packages give the same bytes. Times and memory are on [a page of their own](dagformer_measured.md).\n\n"
        "Modes: **soft** gates lie between 0 and 1; **hard** gates are 0 or 1; the **baseline** has all gates at 1. "
        f"Every difference is paired over the same windows, {results.num_windows:,} held-out ones unless another n is "
        "given. Intervals of 95 % are Student's t, which takes windows as independent; several can be of one document, "
        "so they are somewhat too narrow, and words beside an interval in a table (better if all of it lies below 0, "
        "worse if above) are of that one difference alone, **uncorrected**. Verdicts in sentences are made by rule "
        "from p-values of sign flips of whole documents, corrected for all comparisons of the family (section 8): "
        f"better or worse where p is below {SIGNIFICANT}, too close to say where other flips could have put it on the "
        "other side, else no difference shown."
    )


def at_a_glance(results: Results, analyses: Analyses) -> str:
    """The findings, one line each."""
    runs, outcomes = results.variants, [passed for _, _, passed in checks(results, analyses)]
    baseline = results.main.evaluation["window"]["nll_baseline"]
    lines = [
        f"Baseline NLL {baseline:.4f} on {results.num_windows:,} held-out windows. {sanity.wiring_sentence(results)}"
    ]
    if "S1" in runs:
        lines.append(f"S1 {sanity.identity_sentence(runs['S1'])}")
    if "S2" in runs:
        lines.append(f"S2: {sanity.flow_sentence(analyses, runs['S2'])}")
    lines.append(phase1.default_sentence(results.main, analyses))
    lines += [*comparisons.direction_sentences(results, analyses), *baseline_sentences(results, analyses)]
    if "P2" in runs and runs["P2"].run["from"] in runs:
        lines.append(f"P2: {phase1.extended_sentence(analyses, runs['P2'], runs[runs['P2'].run['from']])}")
    lines.append(ablations.ablation_sentence(results, analyses))
    if "L0" in runs:
        lines.append(f"L0: {ablations.first_layer_sentence(results, analyses, runs['L0'])}")
    if "C1" in runs:
        lines.append(f"C1: {ablations.control_sentence(results, analyses, runs['C1'])}")
    lines += [f"X1: {topology.variance_sentence(name, found)}" for name, found in analyses.topology.items()]
    by_domain = {name: found["domains"] for name, found in analyses.topology.items()}
    lines += [f"X2: {topology.domain_sentence(name, own)}" for name, own in by_domain.items() if own is not None]
    lines.append(f"X3: {sensitivity.flat_sentence(analyses.sensitivity)} {sensitivity.removal_sentence(analyses)}")
    lines.append(f"Signs of gradients: {sensitivity.sign_sentence(analyses.removal)}")
    lines.append(f"Orders of removal: {sensitivity.order_sentence(analyses.sensitivity)}")
    lines.append(f"Gates optimised directly: {sensitivity.oracle_sentence(analyses.sensitivity)}")
    if results.joint is not None:
        lines.append(f"Joint training: {comparisons.joint_sentence(results, analyses)}")
    lines += [
        comparisons.statistics_sentence(analyses),
        health_sentence(results),
        f"{sum(outcomes)} of {count(len(outcomes), 'check')} that the pipeline made passed.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def baseline_sentences(results: Results, analyses: Analyses) -> list[str]:
    """Which variants are better than the baseline, worse or neither, for each mode and protocol; corrected."""
    total = count(len(results.variants), "variant")
    lines = []
    for protocol in PROTOCOLS:
        for mode in MODES:
            found = {name: analyses.verdict("baseline", name, mode, protocol) for name in results.variants}
            none = "" if "better" in found.values() else "better: none; "
            words = f"{total} against the baseline in {mode} mode ({protocol} protocol)"
            lines.append(f"{words}: {none}{by_verdict(found)}.")
    return lines


ABLATIONS = (
    "Each ablation is P1 with one thing changed, and P1 is in every table as reference. All NLL in these tables is by "
    "the window protocol. Sparsity is the share of hard gates that are shut, density the share that are open, among "
    "valid connections; entropy is that of a soft gate: 1 bit where it is undecided, 0 where it is open or shut. A "
    "head is dead if over all held-out windows no hard gate lets anything out of it, or anything in; what such a head "
    "computes still reaches MLPs and output, which are not gated. Empty cells hold what does not exist."
)


def protocols(results: Results) -> str:
    """All variants by both protocols."""
    shared = results.setup
    return "\n\n".join(
        [
            "**Window protocol**: the encoder reads the whole window, as in training and in the published report. It "
            "has then seen the very tokens that are scored, and a gain may be a leak. **Prefix protocol**: the encoder "
            f"reads the first {shared['prefix_tokens']:,} of {shared['seq_len']:,} tokens, and NLL counts only the "
            "rest, in all three modes; the baseline is another number, being one of other tokens. Nothing that is "
            "scored has been read, so a gain there is no leak.",
            figure("figures/dagformer_variants.png", "NLL less that of the baseline, with 95 % intervals."),
            "**Window protocol**",
            ablations.all_variants(results, "window"),
            "**Prefix protocol**",
            ablations.all_variants(results, "prefix"),
            "**Topologies** (window protocol)",
            ablations.topologies(results),
            "mean_A is the mean soft gate; seq_gate_frac and hyp_gate_frac are the shares of soft gates above 0.5 "
            "between adjacent layers and of those that skip layers; hard density is the mean hard gate. All are over "
            "valid connections only, those to a later layer.",
        ]
    )


def analysis_data(results: Results) -> str:
    """What the analyses are made on."""
    shared = shared_text(results.tokens["splits"]["test"])
    return (
        "All on windows of the test split. No training has read its documents, though they share text with others: "
        f"tokens of it that also stand in the training split: {shared}. Permutation tests exchange what would be "
        "exchangeable if there were nothing to find; p is the share of exchanges that show as much, the true order "
        "counted."
    )


def properties(results: Results, analyses: Analyses) -> str:
    """The outcome of every check that a stage made, over all variants."""
    found: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for stage, name, passed in checks(results, analyses):
        kind, _, variant = stage.partition("@")
        found.setdefault((kind, name), []).append((variant, passed))
    rows = []
    for (stage, name), outcomes in found.items():
        failed = [variant for variant, passed in outcomes if not passed]
        mark = f"✗ **failed** {', '.join(failed)}".rstrip() if failed else "✓"
        made = f" (of {len(outcomes)})" if outcomes[0][0] else ""
        rows.append([mark, name.replace("_", " "), f"`{stage}`{made}"])
    return (
        f"{table(['outcome', 'property', 'checked by stage'], rows)}\n\n"
        "Each line is what a check of these runs' stages found. That the baseline is the same for all variants is "
        "checked when this page is made. The DAG forward against transformers and against a slow reference, gates, "
        "schedules and exact resumption are checked by the test suite (`make test`)."
    )


def checks(results: Results, analyses: Analyses) -> list[tuple[str, str, bool]]:
    """(stage, check, passed); the stage with the variant, as DVC names it."""
    records = {"prepare_base": results.base}
    for name, variant in results.variants.items():
        records |= {f"train_dagformer@{name}": variant.training, f"evaluate_nll@{name}": variant.evaluation}
    records |= {f"analyze_topology@{name}": found for name, found in analyses.topology.items()}
    records["analyze_sensitivity"] = analyses.sensitivity
    return [
        (stage, name, passed is True) for stage, record in records.items() for name, passed in record["checks"].items()
    ]


def limitations(results: Results) -> str:
    """What to keep in mind."""
    intervals = len(results.variants) * len(MODES) * len(PROTOCOLS)
    points = [
        f"**Scale.** The base has {results.base['parameters']:,} parameters, and P1 was trained on "
        f"{results.main.training['tokens']:,} tokens. What holds here need not hold for a larger base or budget.",
        "**Few seeds.** Intervals are over windows of text, for these trained predictors. P1 alone was run with "
        "several seeds; section 8 has their spread. Every difference between two others, P1 - C1 and J1 - J0 among "
        "them, has one run on at least one side: it is of these runs, and not yet of the methods.",
        f"**Many comparisons.** There are {intervals} intervals against the baseline alone. Without any effect, about "
        "one in 20 would still exclude 0. Verdicts in sentences are corrected for their number; words beside an "
        "interval are not.",
        "**Windows are not independent**: several can be from one document, so t intervals over windows are somewhat "
        "too narrow. Columns headed by document, corrected verdicts and section 6's X3 do not share this.",
        "**A frozen base.** It was trained with all connections open and never adapts to a wiring, but for section 7.",
        "**The final state is evaluated**, whatever validation said on the way.",
        "**Window protocol.** The predictor has read the tokens that are scored; see section 5.",
    ]
    return "\n".join(f"{number}. {point}" for number, point in enumerate(points, 1))
