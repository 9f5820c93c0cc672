"""What reports/dagformer.md and its part of reports/summary.md show. The sentences are in templates/.

Nothing here depends on time, machine or measured speed, so the pages have the same bytes on every run. Published
numbers appear in columns headed "published" and in quotations that begin with "Published", and nowhere else.
"""

from itertools import product, zip_longest
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
PHASE_1 = (MAIN, "P2", *(f"A{number}" for number in range(1, 12)))
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
BY_STEP = ("step", "nll_soft", "nll_hard", "nll_base", "mean_A")


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
    for row in comparisons.primary:  # each number stands once
        if len(row["left"]) == 1 and (row["mode"], row["protocol"]) == ("hard", "window") and row["left"][0] in rows:
            shown = rows[row["left"][0]]
            shown |= {
                key: "section 1"
                for key, of in (("to_baseline", "baseline"), ("to_reference", shown["peer"]))
                if row["right"] == [of]
            }
    seeds = {**comparisons.seeds["seeds"], **comparisons.control_seeds["seeds"]}
    apart = {*PHASE_1, "S1", *seeds} - {CONTROL}
    domains = analyses.topology[MAIN]["domains"]
    made = checks(results, analyses)
    methods = [method_row(variant, analyses.methods[name]) for name, variant in results.planted.items()]
    return {
        "results": results,
        "variants": results.variants,
        "cards": rows,
        "comparisons": comparisons,
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
        "S1_passed": "S1" in rows and max(map(abs, rows["S1"]["away"].values())) <= WITHIN,
        "spread": comparisons.seeds["window"]["hard"]["spread"] if len(comparisons.seeds["seeds"]) > 1 else None,
        "joint": JOINT if set(JOINT) <= set(rows) else None,
        "L0_planted": _interval(comparisons.hard.loc["planted_L0"], "reference_")
        if "planted_L0" in results.planted
        else None,
        "best": next((row for row in methods if row["id"] == best_planted(results, analyses)), None),
        "blind": best_blind(results, analyses),
        "blind_C1": results.variants[CONTROL].knobs if _closes_nothing(results.variants.get(CONTROL)) else None,
        "gradient_order": _interval(comparisons.hard.loc[MAIN], "least_gradient_"),
        "num_checks": len(made),
        "failed": [name for name, passed in made if passed is not None and passed is not True],
        "columns": {
            "fractions": [(f"{fraction:g}", f"{fraction:.0%}") for fraction in _fractions(analyses.removal)],
            "sources": [(("of", source), source, ".3f") for source in domains["sources"]] if domains else [],
        },
        "rows": {
            "primary": [primary_row(row) for row in comparisons.primary],
            "phase_1": [rows[name] for name in PHASE_1 if name in rows],
            "others": [row for name, row in rows.items() if name not in apart],
            "topology": [topology_row(name, found) for name, found in analyses.topology.items()],
            "domains": [domain_row(name, found["domains"]) for name, found in analyses.topology.items() if domains],
            "distances": source_distances(domains),
            "removal": removal_rows(analyses.removal),
            "groups": group_rows(analyses.sensitivity["groups"]),
            "known": known_rows(analyses.planted),
            "methods": methods,
            "steps": {
                name: beside(results.variants[name].curve, reference[key]["rows"])
                for name, key in (("S1", "identity_init"), ("S2", "gradient_flow"), ("L0", "first_layer_gated"))
                if name in rows
            },
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
    return {**row, "pair": f"{left} − {right}", "interval": interval(row), "answer": answer}


def variant_row(results: Results, comparisons: Comparisons, variant: Variant) -> dict[str, Any]:
    """What tables show of a variant: its knobs, and its evaluation by the window protocol."""
    knobs, window, peer = variant.knobs, variant.evaluation["window"], results.reference(variant)
    changes = {key: value for key, value in variant.changes(results.main).items() if key != "validate_every"}
    cascade = "off" if knobs["cascade"] == "off" else f"k={knobs['cascade_k']:g} {knobs['cascade']}"
    tau, weight = (f"{knobs[f'{name}_init']:g}→{knobs[f'{name}_final']:g}" for name in ("tau", "lambda"))
    notes = ["reference"] if variant is results.main else []
    notes += ["full rank"] if knobs["rank"] >= variant.run["num_layers"] * variant.run["num_heads"] else []
    notes += [f"trained k {window['cascade_k']:.2f}"] if knobs["cascade"] == "learnable" else []
    notes += [variant.training["health"]] if variant.training["health"] != "healthy" else []
    hard = {protocol: comparisons.differences.loc[(variant.name, protocol, "hard")] for protocol in PROTOCOLS}
    return {
        **window,
        "id": variant.name,
        "config": f"r={knobs['rank']}, tau={tau}, cascade {cascade}, lambda={weight}",
        "tokens": variant.training["tokens"],
        "steps": variant.training["steps"],
        "changes": ", ".join(f"{key} {_plain(value)}" for key, value in changes.items()) or None,
        "away": {mode: window[f"nll_{mode}"] / window["nll_baseline"] - 1 for mode in ("soft", "hard")},
        "to_baseline": _interval(hard["window"]),
        "to_reference": _interval(hard["window"], "reference_"),
        "to_reference_prefix": _interval(hard["prefix"], "reference_"),
        "peer": peer,
        "notes": ", ".join(notes) or None,
    }


def beside(curve: "pd.DataFrame", theirs: list[Record]) -> list[dict[str, Any]]:
    """At most MAX_STEPS rows of a curve, evenly spaced, beside the published rows, in their order and not by step."""
    last = len(curve) - 1
    kept = curve.iloc[sorted({round(index * last / (MAX_STEPS - 1)) for index in range(MAX_STEPS)})]
    ours = kept.rename(columns=lambda name: name.removeprefix("validation_").replace("nll_baseline", "nll_base"))
    empty = dict.fromkeys([*ours, *(f"their_{key}" for key in (*BY_STEP, "train_nll", "tau"))])
    pairs = zip_longest(ours.to_dict("records"), theirs, fillvalue={})
    return [empty | own | {f"their_{key}": value for key, value in other.items()} for own, other in pairs]


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


def source_distances(found: Record | None) -> list[dict[Any, Any]]:
    """X2: mean distance from each source to each; a source may have the name of another column."""
    if found is None:
        return []
    columns = [("of", source) for source in found["sources"]]
    rows = zip(found["sources"], found["documents"], found["mean_distances"], strict=True)
    return [
        {"source": source, "documents": number, **dict(zip(columns, means, strict=True))}
        for source, number, means in rows
    ]


def removal_rows(removal: "pd.DataFrame") -> list[dict[str, str]]:
    """X3: a row for each order, then one for each order minus the random one; a column for each share of edges."""
    found = []
    for suffix, prefixes in (
        ("", ("mean", "low", "high")),
        (" − random", ("over_random", "low_over_random", "high_over_random")),
    ):
        for order, own in removal.groupby("order", sort=False):
            if not (suffix and order == "random"):
                cells = {f"{row['fraction']:g}": _columns(row, *prefixes) for _, row in own.iterrows()}
                found.append({"order": ORDERS[order] + suffix, **cells})
    return found


def group_rows(groups: list[Record]) -> list[dict[str, Any]]:
    """X3: layer pairs and heads, those that promise most and least to first order: what their removal did."""
    found = []
    for kind, promising in product(("layers", "head"), (True, False)):
        own = [row for row in groups if (row["kind"], row["promising"]) == (kind, promising)]
        best = min(own, key=lambda row: row["mean"])
        found.append(
            {
                "groups": f"{'most' if promising else 'least'} promising {GROUPS[kind]}",
                "number": len(own),
                "expected": np.mean([row["expected"] for row in own]),
                "measured": np.mean([row["mean"] for row in own]),
                "best": f"{best['first']}{'→' if kind == 'layers' else '.'}{best['second']}: {interval(best)}",
            }
        )
    return found


def _fractions(removal: "pd.DataFrame") -> list[float]:
    """Without any edge there is no order."""
    return sorted(fraction for fraction in removal["fraction"].unique() if fraction < 1)


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


def _closes_nothing(variant: Variant | None) -> bool:
    return variant is not None and variant.evaluation["window"]["density_hard"] == 1


def method_row(variant: Variant, methods: Record) -> dict[str, Any]:
    """What a variant on the planted base found: hard gates, prefix protocol."""
    found, knobs, evaluation = methods["prefix"], variant.knobs, variant.evaluation["prefix"]
    tau = f"{knobs['tau_init']:g}→{knobs['tau_final']:g}"
    return {
        "id": variant.name,
        "gates": f"{knobs['gates'].replace('_', ' ')}, logit {knobs['init_logit']:g}, tau {tau}, lr {knobs['lr']:g}",
        "density": evaluation["density_hard"],
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
