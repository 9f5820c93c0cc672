"""Joint training, seeds, and the statistics under the report's differences."""

import math
from typing import TYPE_CHECKING

from dynaroute.analysis.statistics import CLOSE, FLIPS, RESAMPLES, SETS, SIGNIFICANT, Interval, verdict
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import MODES, PROTOCOLS, REFERENCE_VARIANT, Pool, Results
from dynaroute.reporting.dagformer.setup import health
from dynaroute.reporting.dagformer.topology import resampled, to_interval
from dynaroute.reporting.dagformer.wording import VERDICTS, budget, by_verdict, interval, knobs, numbers, signed
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, count, table

if TYPE_CHECKING:
    import pandas as pd

FAMILIES = {
    "baseline": "every variant against the baseline",
    "direction": "averages of variants against the baseline",
    "reference": "every ablation but C1 against P1",
    "control": "P1 and its seeds against C1",
    "joint": "J1 against J0",
}
OPEN = 0.99  # hard density above which joint training left the gates as they were


# --- joint training ------------------------------------------------------------------------------------------------


def joint(results: Results, analyses: Analyses) -> str:
    """J1: the base trained jointly with the predictor, against J0, the same base trained on alone."""
    ours, alone = results.joint
    rows = [
        ["Config", knobs(ours.knobs), knobs(alone.knobs)],
        ["Learning rate of the base", *(f"{one.knobs['base_lr']:g}" for one in (ours, alone))],
        ["Tokens", *(budget(results, one) for one in (ours, alone))],
        ["Training", *(health(one) for one in (ours, alone))],
    ]
    for protocol in PROTOCOLS:
        for mode in MODES:
            cells = (f"{one.nll(mode, protocol):.4f}" for one in (ours, alone))
            rows.append([f"nll_{mode}, {protocol} protocol", *cells])
        open_nll = (f"{one.evaluation[protocol]['nll_own_base']:.4f}" for one in (ours, alone))
        rows.append([f"its own base with all gates at one, {protocol} protocol", *open_nll])
        rows.append([f"nll of the frozen base, {protocol} protocol", *[f"{ours.nll('baseline', protocol):.4f}"] * 2])
    rows.append(["hard density", *(f"{one.evaluation['window']['density_hard']:.3f}" for one in (ours, alone))])
    return "\n\n".join(
        [
            f"On a frozen base that was trained with all gates open, A = 1 may be the best there is. So {ours.name} "
            f"trains the base jointly with the predictor. {alone.name} is the same run with gates held open: the base "
            "trained on alone, on the same tokens in the same order. It has no gates to learn, so its alarm says "
            f"nothing. {joint_sentence(results, analyses)}",
            table(["item", ours.name, alone.name], rows),
            table(
                ["protocol", "mode", f"{ours.name} - {alone.name} [95 %]", "by document", "after correction"],
                [[row["protocol"], row["mode"], *_cells(row)] for row in _rows(analyses.comparisons, "joint")],
            ),
        ]
    )  # fmt: skip


def joint_sentence(results: Results, analyses: Analyses) -> str:
    """The outcome, by the corrected verdicts."""
    ours, alone = results.joint
    found = {f"{row['mode']} ({row['protocol']})": row for row in _rows(analyses.comparisons, "joint")}
    outcome = by_verdict({name: row["verdict"] for name, row in found.items()})
    soft, density = _interval(found["soft (prefix)"]), ours.evaluation["window"]["density_hard"]
    sentence = (
        f"{ours.name} against {alone.name}, one seed of each: {outcome}. Soft, by the prefix protocol: {numbers(soft)}."
    )
    if density > OPEN:
        return (
            f"{sentence} But {density:.1%} of {ours.name}'s hard gates are open, more than {OPEN:.0%}: the gates "
            "stayed open, so the two are nearly the same model, and the comparison says nothing of the method."
        )
    return f"{sentence} {density:.1%} of {ours.name}'s hard gates are open."


# --- seeds ---------------------------------------------------------------------------------------------------------


def seeds(analyses: Analyses) -> str:
    """How much of P1's difference is the luck of its seed."""
    found = analyses.seeds
    names = list(found["seeds"])
    if len(names) < 2:
        return "P1 was run with one seed: its spread is not known."
    rows = [[protocol, mode, *_seed_cells(found[protocol][mode], names)] for protocol in PROTOCOLS for mode in MODES]
    header = ["protocol", "mode", *(f"{name} (seed {seed})" for name, seed in found["seeds"].items())]
    return "\n\n".join(
        [
            "NLL less that of the baseline. A seed decides the predictor's initialisation, its noise and the order of "
            "the text; the frozen baseline has none. Whether they differ from it on the whole is tested above.",
            table([*header, "spread", "mean over seeds [95 %]", "seeds"], rows),
            "Spread is the standard deviation over seeds. The interval is over seeds, not over windows: it is what "
            "can be said of the method, where all others are of one trained predictor. With few seeds it is so wide "
            "that no verdict is made from it.",
        ]
    )


def _seed_cells(found: Record, names: list[str]) -> list[str]:
    differences = [signed(found["differences"][name]) for name in names]
    return [*differences, f"{found['spread']:.4f}", _span(to_interval(found)), f"{found['n']}"]


def _span(found: Interval) -> str:
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


# --- direction -----------------------------------------------------------------------------------------------------


def direction(results: Results, analyses: Analyses) -> str:
    """Whether what was trained lies on one side of the baseline on the whole."""
    rule = (
        "**Direction.** Each variant alone may show nothing where all of them together do. So they are averaged window "
        "by window before they are compared with the baseline: all variants on the frozen base, whatever they "
        "change and however they ended, and P1 over its seeds. The rule looks at settings alone, and would say better, "
        "worse or neither alike. Both averages, protocols and modes are one family. Signs are flipped by document, so "
        "this speaks of these predictors on other text; how other seeds would differ is in the next section."
    )
    pools = [pool for pool in results.pools() if _pooled(analyses, pool)]
    if not pools:
        return f"{rule} There are no two such variants."
    rows = [
        [pool.name, f"{len(pool.members)}", row["protocol"], row["mode"], *_cells(row)]
        for pool in pools
        for row in _pooled(analyses, pool)
    ]
    header = ["average of", "variants", "protocol", "mode", "less the baseline [95 %]", "by document"]
    return f"{rule}\n\n{table([*header, 'after correction'], rows)}"


def direction_sentences(results: Results, analyses: Analyses) -> list[str]:
    """The outcome for every average, with how many of its members are on either side."""
    sentences = []
    for pool in results.pools():
        rows = _pooled(analyses, pool)
        words = by_verdict({f"{row['mode']} ({row['protocol']})": row["verdict"] for row in rows})
        soft = []
        for row in rows:
            if row["mode"] == "soft":
                above = sum(one.to_baseline("soft", row["protocol"]).mean > 0 for one in pool.members)
                soft.append(
                    f"{signed(row['mean'])} by the {row['protocol']} protocol ({resampled(row)}; NLL is above the "
                    f"baseline's with {above} of the {len(pool.members)})"
                )
        sentences.append(
            f"Direction, {pool.name}: {count(len(pool.members), 'variant')} averaged window by window, against the "
            f"baseline: {words}. Soft: {', '.join(soft)}."
        )
    return sentences


def _pooled(analyses: Analyses, pool: Pool) -> list[dict]:
    return [row for row in _rows(analyses.comparisons, "direction") if row["ours"] == pool.name]


# --- statistics ----------------------------------------------------------------------------------------------------


def statistics(results: Results, analyses: Analyses) -> str:
    """What is behind the verdicts, and what is left of them after correction."""
    families = []
    for name, words in FAMILIES.items():
        rows = list(_rows(analyses.comparisons, name))
        if rows:
            single = [verdict(_interval(row)) for row in rows]
            corrected = [row["verdict"] for row in rows]
            counts = (f"{single.count(one)} → {corrected.count(one)}" for one in VERDICTS)
            families.append([words, f"{len(rows)}", *counts])
    main = [row for row in _rows(analyses.comparisons, "baseline") if row["ours"] == REFERENCE_VARIANT]
    return "\n\n".join(
        [
            "**Families of tests.** Interval verdicts look at one difference alone. Of many, some exclude 0 by chance, "
            f"so each family is corrected for its number of tests: p below {SIGNIFICANT} by the step-down procedure of "
            "Westfall and Young, whose permutations exchange the two sides of whole documents, for all tests of the "
            "family together. Counts are by interval → after correction. " + statistics_sentence(analyses),
            monte_carlo_sentence(analyses),
            table(["family", "tests", *VERDICTS], families),
            direction(results, analyses),
            "**P1 against the baseline.** The t interval takes windows as independent. The bootstrap draws whole "
            f"documents ({RESAMPLES:,} times), and the permutation test exchanges them. Effect size is the mean "
            "difference in standard deviations of a window's. Detectable is the difference that the t interval of "
            "that many windows would show four times in five.",
            table(
                ["protocol", "mode", "difference [95 %]", "by document", "after correction", *_POWER],
                [
                    [row["protocol"], row["mode"], *_cells(row), *(show(row) for show in _POWER.values())]
                    for row in main
                ],
            ),
            f"All {count(len(analyses.comparisons), 'comparison')} are in `statistics/comparisons.csv`.",
        ]
    )  # fmt: skip


def monte_carlo_sentence(analyses: Analyses) -> str:
    """How far chance in drawing flips may have the corrected p-values off, and what it leaves undecided."""
    rows = analyses.comparisons
    nearest = rows.loc[(rows["p_corrected"] - SIGNIFICANT).abs().idxmin()]
    undecided = int((rows["verdict"] == "too close to say").sum())
    return (
        f"A corrected p is the mean over {SETS} sets of {FLIPS:,} random flips, and ± is the Monte Carlo standard "
        "error of that mean: how far other flips could have moved it. The largest is "
        f"{rows['p_error'].max():.1g}. A p within {CLOSE:g} of its errors of {SIGNIFICANT} is too close to say: "
        f"{undecided} of {count(len(rows), 'comparison')}. Nearest is {nearest['ours']} - {nearest['theirs']}, "
        f"{nearest['mode']} ({nearest['protocol']}): {nearest['p_corrected']:.4f} ± {nearest['p_error']:.1g}."
    )


def _cells(row: dict) -> list[str]:
    return [
        interval(_interval(row)),
        resampled(row),
        f"{row['verdict']} (p = {row['p_corrected']:.2g} ± {row['p_error']:.1g})",
    ]


_POWER = {
    "effect size": lambda row: NONE if math.isnan(row["effect_size"]) else f"{row['effect_size']:+.2f}",
    "detectable": lambda row: f"{row['detectable']:.4f}",
    "n": lambda row: f"{row['n']:,}",
}


def statistics_sentence(analyses: Analyses) -> str:
    """Which variants differ from the baseline after correction."""
    rows = list(_rows(analyses.comparisons, "baseline"))
    parts = []
    for words in ("better", "worse", "too close to say"):
        names = dict.fromkeys(row["ours"] for row in rows if row["verdict"] == words)
        if names or words in ("better", "worse"):
            parts.append(f"{words} in some mode and protocol: {', '.join(names) or 'none'}")
    return f"After correction, against the baseline: {'; '.join(parts)}."


def _rows(comparisons: "pd.DataFrame", family: str) -> list[dict]:
    return comparisons[comparisons["family"] == family].to_dict("records")


def _interval(row: dict | Record) -> Interval:
    return Interval(row["mean"], row["low"], row["high"], int(row["n"]))
