"""X1, X2 and the protocols: whether texts are wired differently, by domain as well, and what it is worth."""

from dynaroute.evaluation.domains import MAX_SOURCES
from dynaroute.evaluation.statistics import SIGNIFICANT, Interval, corrected_verdict, holm
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import MODES, PROTOCOLS, REFERENCE_VARIANT
from dynaroute.reporting.dagformer.wording import interval, numbers
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import count, figure, table

LAYER_PAIRS = 6  # shown of those that differ most by source


def to_interval(found: Record) -> Interval:
    """The t interval of a comparison."""
    return Interval(found["mean"], found["low"], found["high"], found["n"])


def p_value(p: float) -> str:
    """A p-value for a cell or a sentence."""
    return f"p = {p:.2g}"


def resampled(found: Record) -> str:
    """What whole documents say of a difference: bootstrap interval, p and their number, for a cell."""
    low, high = found["bootstrap_low"], found["bootstrap_high"]
    return f"[{low:+.4f}, {high:+.4f}], {p_value(found['p'])}, {count(found['groups'], 'document')}"


# --- X1 ------------------------------------------------------------------------------------------------------------


def variance(analyses: Analyses) -> str:
    """X1: how much wirings vary with the text."""
    varied = [
        [name, mode, *(show(found["variation"]["window"][mode]) for show in _VARIATION.values())]
        for name, found in analyses.topology.items()
        for mode in MODES
    ]
    alike = [
        [name, mode, f"{test['observed']:+.4f}", f"{test['chance']:+.4f}", p_value(test["p"])]
        for name, found in analyses.topology.items()
        for mode in MODES
        for test in [found["same_text"][mode]]
    ]
    swapped = [
        [name, protocol, interval(to_interval(test)), resampled(test)]
        for name, found in analyses.topology.items()
        for protocol, test in found["swapped"].items()
    ]
    return "\n\n".join(
        [
            "Does the predictor wire different texts differently? "
            + " ".join(variance_sentence(name, found) for name, found in analyses.topology.items()),
            "Over held-out windows, by the window protocol. Distance is the weighted Jaccard distance of two texts' "
            "gates, 1 - sum min / sum max, which for hard gates is the Jaccard distance of their sets of edges. "
            "Entropy is a gate's in one text: 1 bit where it is undecided, 0 where it is open or shut. Information is "
            "what one gate tells about the text on average; effective rank, along how many directions wirings differ "
            "(0: not at all).",
            table(["ID", "mode", *_VARIATION], varied),
            "**First null, one wiring for all texts**: every measure is then 0, as for C1. **Second null, texts "
            "shuffled**: the same wirings, dealt to other texts. Soft NLL of texts under their own wiring, less that "
            "under the wirings of other texts; below 0, a text is served better by its own. This decides the question; "
            "p is of sign flips of whole documents, above corrected for the two protocols (Holm).",
            table(["ID", "protocol", "own - others' [95 %]", "by document"], swapped),
            "**Are wirings of one text alike?** Those of a whole window and of its prefix, against those of any two "
            "texts. This shows only that the predictor's map keeps what its input has in common: any map that is not "
            "constant passes, a random one too, so it decides nothing; a failure would show a predictor that reacts to "
            "noise alone.",
            table(["ID", "mode", "closer by", "by chance", "permutation test"], alike),
            figure(
                "figures/dagformer_topology_variance.png",
                "Variance of P1's soft gates over texts, and distances of wirings of different texts and of the same.",
            ),
        ]
    )


def variance_sentence(name: str, found: Record) -> str:
    """The verdict on one variant, by rule: whether its wirings vary, and whether a text is served better by its own."""
    varied = found["variation"]["window"]["soft"]
    if varied["distinct"] == 1:
        return f"{name}: no, one wiring for all {found['n']:,} texts."
    tests = found["swapped"]
    outcomes = []
    for protocol, p in zip(PROTOCOLS, holm([tests[protocol]["p"] for protocol in PROTOCOLS]), strict=True):
        words = {
            "better": "a text's own wiring serves it better than another text's",
            "worse": "a text's own wiring serves it worse than another text's",
        }.get(corrected_verdict(tests[protocol]["mean"], p), "that a text's own wiring serves it better is not shown")
        outcomes.append(f"{words} ({protocol} protocol: {numbers(to_interval(tests[protocol]))}, {p_value(p)})")
    return f"{name}: wirings vary (mean distance {varied['distance_mean']:.4f}); {'; '.join(outcomes)}."


_VARIATION = {
    "variance of a gate": lambda found: f"{found['gate_variance']:.5f}",
    "distance, mean": lambda found: f"{found['distance_mean']:.4f}",
    "distance, variance": lambda found: f"{found['distance_variance']:.5f}",
    "entropy (bits)": lambda found: f"{found['entropy_bits']:.4f}",
    "information (bits)": lambda found: f"{found['information_bits']:.4f}",
    "effective rank": lambda found: f"{found['effective_rank']:.1f}",
    "different wirings": lambda found: f"{found['distinct']:,}",
}


# --- X2 ------------------------------------------------------------------------------------------------------------


def domains(analyses: Analyses) -> str:
    """X2: whether wirings differ by the source of the text."""
    shown = {name: found["domains"] for name, found in analyses.topology.items() if found["domains"] is not None}
    if not shown:
        return (
            f"The test split has no two sources, or more than {MAX_SOURCES}, with whole windows of at least two "
            "documents each: nothing to compare."
        )
    first = next(iter(shown.values()))
    sizes = ", ".join(
        f"{source} ({count(number, 'document')})"
        for source, number in zip(first["sources"], first["documents"], strict=True)
    )
    parts = [
        "Does the wiring depend on where a text is from? "
        + " ".join(domain_sentence(name, found) for name, found in shown.items()),
        f"{first['windows_per_source']:,} windows of the test split from each source alone, each within one document: "
        f"{sizes}. Windows of one document are alike, so pairs of them do not count, a probe is tested on documents "
        "that it was not fitted on, and permutations exchange the sources of whole documents. Separation is the mean "
        "distance of windows of different sources less that of the same one. The probe is ridge regression on soft "
        "gates, by its balanced accuracy: the mean over sources of the mean over their documents of the share of "
        "windows told. The same probe on the text vectors, from which the wirings are made, shows what there was to "
        "find.",
        table(
            ["ID", "test", "observed", "by chance", "permutation test"],
            [
                [name, words, *(format(test[key], style) for key in ("observed", "chance")), p_value(test["p"])]
                for name, found in shown.items()
                for words, test, style in _domain_tests(found)
            ],
        ),
    ]
    for name, found in shown.items():
        certain = found["probe"]["p"] < SIGNIFICANT or found["soft"]["separation"]["p"] < SIGNIFICANT
        if certain or name == REFERENCE_VARIANT:
            parts += [f"**{name}**: mean distance from source to source, soft gates.", _distances(found)]
            parts += [_layer_pairs_sentence(found), _layer_pairs(found)]
    parts.append(
        figure("figures/dagformer_domains.png", "P1's mean soft gates for each source, less their mean over sources.")
    )
    return "\n\n".join(parts)


def domain_sentence(name: str, found: Record) -> str:
    """The verdict on one variant, by rule."""
    separation, probe = found["soft"]["separation"], found["probe"]
    outcomes = []
    for test, words in ((separation, "differ more between sources than within"), (probe, "tell the source")):
        outcomes.append(f"{'' if test['p'] < SIGNIFICANT else 'are not shown to '}{words} ({p_value(test['p'])})")
    accuracy = f"a linear probe's balanced accuracy is {probe['observed']:.1%}, {probe['chance']:.1%} by chance"
    return f"{name}'s wirings {' and '.join(outcomes)}: {accuracy}."


def _domain_tests(found: Record) -> list[tuple[str, Record, str]]:
    return [
        *((f"separation, {mode}", found[mode]["separation"], "+.4f") for mode in MODES),
        ("probe of the gates", found["probe"], ".1%"),
        ("probe of the text vectors", found["text_probe"], ".1%"),
    ]


def _distances(found: Record) -> str:
    means = found["soft"]["mean_distances"]
    return table(["source", *found["sources"]], [
        [source, *(f"{value:.4f}" for value in row)] for source, row in zip(found["sources"], means, strict=True)
    ])  # fmt: skip


def _layer_pairs_sentence(found: Record) -> str:
    differ = sum(pair["p_holm"] < SIGNIFICANT for pair in found["layer_pairs"])
    return (
        f"{differ} of {count(len(found['layer_pairs']), 'layer pair')} differ by source after correction for their "
        "number (Holm). Those of which sources explain most of the variance:"
    )


def _layer_pairs(found: Record) -> str:
    pairs = sorted(found["layer_pairs"], key=lambda pair: (pair["p_holm"], -pair["explained"]))[:LAYER_PAIRS]
    rows = []
    for pair in pairs:
        shares = [f"{pair[key]:.1%}" for key in ("explained", "chance")]
        means = [f"{mean:.3f}" for mean in pair["means"]]
        rows.append([f"{pair['source']} → {pair['target']}", *shares, f"{pair['p_holm']:.2g}", *means])
    return table(
        ["layers", "explained", "by chance", "p, corrected", *(f"mean, {one}" for one in found["sources"])], rows
    )


# --- protocols -----------------------------------------------------------------------------------------------------


def reading(analyses: Analyses) -> str:
    """How much of a difference is that the encoder has read what is scored."""
    rows = []
    for name, found in analyses.topology.items():
        for mode in MODES:
            tests = [found["reading"][mode][key] for key in ("read", "not_read", "read_minus_not_read")]
            rows.append([name, mode, *(interval(to_interval(test)) for test in tests), resampled(tests[-1])])
    return "\n\n".join(
        [
            "The same tokens, those after the prefix, scored under the wiring of an encoder that has read them, and of "
            "one that has not. The difference of the two is what reading the answer is worth; for one topology for "
            "all texts it is 0. p is of sign flips of whole documents, in sentences corrected for both modes (Holm). "
            + " ".join(reading_sentence(name, found) for name, found in analyses.topology.items()),
            table(["ID", "mode", "read - baseline", "not read - baseline", "read - not read", "by document"], rows),
        ]
    )


def reading_sentence(name: str, found: Record) -> str:
    """What reading the answer is worth to one variant, by the rule of `variance_sentence`."""
    tests = [found["reading"][mode]["read_minus_not_read"] for mode in MODES]
    parts = []
    for mode, test, p in zip(MODES, tests, holm([test["p"] for test in tests]), strict=True):
        change = {"better": "lowers", "worse": "raises"}
        words = change.get(corrected_verdict(test["mean"], p), "is not shown to change")
        parts.append(f"{words} {mode} NLL ({numbers(to_interval(test))}, {p_value(p)})")
    return f"{name}: having read it {' and '.join(parts)}."
