"""What reports/dagformer.md and its part of reports/summary.md show. The sentences are in templates/.

Nothing here depends on time, machine or measured speed, so the pages have the same bytes on every run. Published
numbers appear in columns headed "published" and in quotations that begin with "Published", and nowhere else.
"""

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaroute.analysis.comparisons import UNANSWERABLE
from dynaroute.analysis.statistics import SIGNIFICANT
from dynaroute.config.dagformer import PROTOCOLS
from dynaroute.reporting.dagformer.results import CONTROL, JOINT, MAIN, Analyses, Comparisons, Results, Variant
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import interval, share, shared_text

if TYPE_CHECKING:
    import pandas as pd

WITHIN = 0.01  # S1's criterion, as published: NLL within 1 % of the baseline
MAX_STEPS = 7  # rows of a table by step
ANSWERS = {"better": "yes", "worse": "no, it is worse", UNANSWERABLE: UNANSWERABLE}
KNOWN = {  # wirings of the planted base
    "other": "the masks of the other sources",
    "mean": "the mean of all masks",
    "one": "every gate open",
    "zero": "every gate closed",
}
GROUPS = {"layers": "layer pairs", "head": "heads"}
ORDERS = {"random": "random", "least_gradient": "least gradient first", "expected_gain": "expected gain first"}


def values(
    results: Results,
    comparisons: Comparisons,
    analyses: Analyses,
    tokens: Record,
    reference: Record,
    stability: Record | None,
) -> dict[str, Any]:
    """What the templates show.

    Args:
        results, comparisons, analyses: of the same runs.
        tokens: the metadata of the token shards.
        reference: the published numbers.
        stability: the benchmark that repeats the primary questions; None if it was not run.
    """
    rows = {name: variant_row(results, comparisons, variant) for name, variant in results.variants.items()}
    for row, shown in product(comparisons.primary, rows.values()):  # each number stands once
        if (row["left"], row["mode"], row["protocol"]) == ([shown["id"]], "hard", "window"):
            repeated = {"to_baseline": ["baseline"], "to_reference": [shown["peer"]]}
            shown |= {key: "section 1" for key, right in repeated.items() if row["right"] == right}
    apart = {"S1", *comparisons.seeds["seeds"], *comparisons.control_seeds["seeds"]} - {MAIN, CONTROL}
    domains = analyses.topology[MAIN]["domains"]
    made = checks(results, analyses)
    methods = [method_row(variant, analyses.methods[name]) for name, variant in results.planted.items()]
    return {
        "results": results,
        "variants": results.variants,
        "cards": rows,
        "sensitivity": analyses.sensitivity,
        "known": analyses.planted,
        "domains": domains,
        "reference": reference,
        "stability": stability,
        "setup": results.setup,
        "tokens": tokens,
        "shared": shared_text(tokens["splits"]["test"]),
        "num_documents": len(set(results.documents.tolist())),
        "significant": SIGNIFICANT,
        "within": WITHIN,
        "all_closed": analyses.sensitivity["all_closed"]["mean"] / results.main.evaluation["window"]["nll_baseline"],
        "S1_passed": "S1" in rows and max(map(abs, rows["S1"]["away"].values())) <= WITHIN,
        "spread": comparisons.seeds["window"]["hard"]["spread"] if len(comparisons.seeds["seeds"]) > 1 else None,
        "joint": JOINT if set(JOINT) <= set(rows) else None,
        "L0_planted": _interval(comparisons.hard.loc["planted_L0"], "reference_")
        if "planted_L0" in results.planted
        else None,
        "best": next((row for row in methods if row["id"] == best_planted(results, analyses)), None),
        "blind": best_blind(results, analyses),
        "gradient_order": _interval(comparisons.hard.loc[MAIN], "least_gradient_"),
        "num_checks": len(made),
        "failed": [name for name, passed in made if passed is not None and passed is not True],
        # Without any edge there is no order.
        "fractions": [(one, f"{one:.0%}") for one in analyses.removal["fraction"].unique() if one < 1],
        "rows": {
            "primary": [primary_row(row) for row in comparisons.primary],
            "variants": [row for name, row in rows.items() if name not in apart],
            "topology": [topology_row(name, found) for name, found in analyses.topology.items()],
            "domains": [domain_row(name, found["domains"]) for name, found in analyses.topology.items() if domains],
            "removal": list(removal_rows(analyses.removal)),
            "groups": list(group_rows(analyses.sensitivity["groups"])),
            "known": known_rows(analyses.planted),
            "methods": methods,
            "steps": {name: thinned(results.variants[name].curve) for name in ("S1", "S2", "L0") if name in rows},
        },
    }


def summary(results: Results, comparisons: Comparisons, analyses: Analyses) -> dict[str, Any]:
    """The numbers that people ask for first."""
    window = results.main.evaluation["window"]
    return {
        "nll_baseline": window["nll_baseline"],
        "nll_P1": window["nll_hard"],
        "hard_density_P1": window["density_hard"],
        **{f"{row['left'][0]}_minus_{row['right'][0]}": row["mean"] for row in comparisons.primary},
        "failed_checks": sum(passed is False for _, passed in checks(results, analyses)),
    }


def primary_row(row: Record) -> dict[str, Any]:
    """A primary question and its answer."""
    left, right = (", ".join(row[side]) for side in ("left", "right"))
    answer = ANSWERS.get(row["answer"], row["answer"])
    by = f"{row['mode']}, {row['protocol']}"
    return {**row, "pair": f"{left} − {right}", "by": by, "interval": interval(row), "answer": answer}


def variant_row(results: Results, comparisons: Comparisons, variant: Variant) -> dict[str, Any]:
    """What tables show of a variant: its knobs, and its evaluation by the window protocol."""
    knobs, window, peer = variant.knobs, variant.evaluation["window"], results.reference(variant)
    differing = {key: value for key, value in variant.changes(results.main).items() if key != "validate_every"}
    changes = [f"{key} {_plain(value)}" for key, value in differing.items()]
    cascade = "off" if knobs["cascade"] == "off" else f"k={knobs['cascade_k']:g} {knobs['cascade']}"
    tau, weight = (f"{knobs[f'{name}_init']:g}→{knobs[f'{name}_final']:g}" for name in ("tau", "lambda"))
    changes += ["(full rank)"] if knobs["rank"] >= variant.run["num_layers"] * variant.run["num_heads"] else []
    changes += [f"(trained k {window['cascade_k']:.2f})"] if knobs["cascade"] == "learnable" else []
    changes += [f"({variant.training['health']})"] if variant.training["health"] != "healthy" else []
    hard = {protocol: comparisons.differences.loc[(variant.name, protocol, "hard")] for protocol in PROTOCOLS}
    return {
        **window,
        "id": variant.name,
        "config": f"r={knobs['rank']}, tau={tau}, cascade {cascade}, lambda={weight}",
        "tokens": variant.training["tokens"],
        "steps": variant.training["steps"],
        "changes": ", ".join(changes).replace(", (", " (") or None,
        "away": {mode: window[f"nll_{mode}"] / window["nll_baseline"] - 1 for mode in ("soft", "hard")},
        "to_baseline": _interval(hard["window"]),
        "to_reference": _interval(hard["window"], "reference_"),
        "to_reference_prefix": _interval(hard["prefix"], "reference_"),
        "peer": peer,
    }


def thinned(curve: "pd.DataFrame") -> "pd.DataFrame":
    """At most MAX_STEPS rows of a curve, evenly spaced."""
    return curve.iloc[np.unique(np.linspace(0, len(curve) - 1, MAX_STEPS).round().astype(int))]


def topology_row(name: str, found: Record) -> dict[str, Any]:
    """X1: how wirings vary, and what a text's own wiring is worth."""
    swapped = {protocol: interval(found["swapped"][protocol]) for protocol in PROTOCOLS}
    read = interval(found["reading"]["hard"]["read_minus_not_read"])
    return {"id": name, **found["variation"]["window"]["soft"], **swapped, "read": read}


def domain_row(name: str, found: Record) -> dict[str, Any]:
    """X2: what wirings tell about the source of a text."""
    tests = {"separation": found["separation"], "probe": found["probe"], "text_probe": found["text_probe"]}
    text = {"separation": "{observed:.3f} (p = {p:.2g})"}
    shown = {key: text.get(key, "{observed:.0%} (p = {p:.2g})").format(**test) for key, test in tests.items()}
    return {"id": name, **shown}


def removal_rows(removal: "pd.DataFrame") -> Iterator[dict[Any, str]]:
    """X3: a row for each order, then one for each order minus the random one; a column for each share of edges."""
    for suffix, columns in (
        ("", ("mean", "low", "high")),
        (" − random", ("over_random", "low_over_random", "high_over_random")),
    ):
        for order, own in removal.groupby("order", sort=False):
            if not (suffix and order == "random"):
                cells = {fraction: _columns(row, *columns) for fraction, row in own.set_index("fraction").iterrows()}
                yield {"order": ORDERS[order] + suffix, **cells}


def group_rows(groups: list[Record]) -> Iterator[dict[str, Any]]:
    """X3: layer pairs and heads, those that promise most and least to first order: what their removal did."""
    for kind, promising in product(GROUPS, (True, False)):
        own = [row for row in groups if (row["kind"], row["promising"]) == (kind, promising)]
        means = {key: np.mean([row[key] for row in own]) for key in ("expected", "mean")}
        yield {"groups": f"{'most' if promising else 'least'} promising {GROUPS[kind]}", "number": len(own), **means}


def known_rows(known: Record | None) -> list[dict[str, Any]]:
    """NLL of wirings of the planted base that need no training, minus that of the planted ones."""
    return [
        {"wiring": words} | {protocol: interval(known[protocol]["minus_own"][key]) for protocol in PROTOCOLS}
        for key, words in (KNOWN.items() if known else ())
    ]


def best_planted(results: Results, analyses: Analyses) -> str | None:
    """The variant that comes closest to the planted NLL by the prefix protocol; None without a planted base."""
    return min(results.planted, key=lambda name: analyses.methods[name]["prefix"]["above_own"]["mean"], default=None)


def best_blind(results: Results, analyses: Analyses) -> dict[str, Any] | None:
    """The best wiring of the planted base that reads no text, and how much of the rest the best predictor closes.

    By the prefix protocol: wiring, its name; above, its NLL minus that of the planted wirings; closed, the share.
    """
    best = best_planted(results, analyses)
    if best is None:
        return None
    known = analyses.planted["prefix"]["minus_own"]
    above = {words: known[key]["mean"] for key, words in KNOWN.items() if key != "other"}
    found = {name: analyses.methods[name]["prefix"]["above_own"]["mean"] for name in results.planted}
    above |= {name: found[name] for name, own in results.planted.items() if own.knobs["predictor_input"] != "text"}
    wiring = min(above, key=above.__getitem__)
    return {"wiring": wiring, "above": above[wiring], "closed": 1 - found[best] / above[wiring]}


def method_row(variant: Variant, methods: Record) -> dict[str, Any]:
    """What a variant on the planted base found: hard gates, prefix protocol."""
    found, knobs, evaluation = methods["prefix"], variant.knobs, variant.evaluation["prefix"]
    gates = f"logit {knobs['init_logit']:g}, tau {knobs['tau_init']:g}→{knobs['tau_final']:g}"
    return {
        "id": variant.name,
        "method": f"{variant.name}: {gates}",
        "above_own": interval(found["above_own"], 3),
        "escape": share(found["escape"]),
        "context": share(found["context"]),
        "identified": found["probe"]["observed"],
        "agreement": found["agreement"],
        **{f"window_{key}": share(methods["window"][key]) for key in ("escape", "context")},
        "random": evaluation["nll_random"] - evaluation["nll_hard"],
    }


def checks(results: Results, analyses: Analyses) -> list[tuple[str, bool | None]]:
    """Every check that a stage made, by its name and variant; None: it measured nothing."""
    records = {"": results.base, "sensitivity": analyses.sensitivity}
    records |= {f"wirings of {name}": found for name, found in analyses.topology.items()}
    for name, variant in (results.variants | results.planted).items():
        records |= {f"training of {name}": variant.training, f"evaluation of {name}": variant.evaluation}
    return [
        (f"{check.replace('_', ' ')} ({of})" if of else check.replace("_", " "), passed)
        for of, record in records.items()
        for check, passed in record["checks"].items()
    ]


def _interval(row: "pd.Series", prefix: str = "") -> str:
    return _columns(row, *(f"{prefix}{part}" for part in ("difference", "low", "high")))


def _columns(row: "pd.Series", *columns: str) -> str:
    """The interval in three columns of a row; a dash where they are empty."""
    found = [row[column] for column in columns]
    return interval(None if found[0] != found[0] else dict(zip(("mean", "low", "high"), found, strict=True)))


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
