"""reports/dagformer.md: the published report's tables, filled from these runs. The sentences stand in templates/.

Nothing here depends on time, machine or measured speed, so the page has the same bytes on every run. Published numbers
appear in columns headed "published" and in quotations that begin with "Published", and nowhere else.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dynaroute.analysis.statistics import SIGNIFICANT
from dynaroute.config.dagformer import MODES, PROTOCOLS
from dynaroute.reporting.dagformer.results import CONTROL, JOINT, MAIN, Analyses, Comparisons, Results, Variant
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import count, interval, listed, outcome, share, shared_text

if TYPE_CHECKING:
    import pandas as pd

WITHIN = 0.01  # S1's criterion, as published: NLL within 1 % of the baseline
MOVED = 0.01  # gates have left their initialisation if mean_A or hard density changed by more than this
NEARLY_OPEN = 0.99  # hard density above which joint training left the gates as they were
L0_PLANTED = "planted_L0"  # the layer-0 bug on the planted base
MAX_STEPS = 12  # rows of a per-step table
SHOWN = 5  # of the layer pairs and heads
GROUPS = {  # ablation tables, in the order of their rows
    "rank": ("A1", "A2", MAIN, "A3", "A4"),
    "temperature": ("A5", MAIN, "A6", "A7"),
    "sparsity": ("A8", MAIN, "A9"),
    "cascade": ("A10", MAIN, "A11"),
    "first_layer": (MAIN, "L0"),
    "control": (MAIN, CONTROL),
}
SECTIONS = ("S1", "S2", "S2flip", "P2", *JOINT)  # variants with a section of their own
COLUMNS = {  # of variants.csv, with an interval each
    "baseline": ("difference", "low", "high"),
    "reference": ("reference_difference", "reference_low", "reference_high"),
}
KNOWN = {  # wirings of the planted base
    "other": "masks of other sources",
    "mean": "mean of all masks",
    "one": "every gate open (A = 1)",
    "zero": "every gate closed",
}
ORDERS = {"random": "random", "least_gradient": "least gradient first", "expected_gain": "expected gain first"}


def page(results: Results, comparisons: Comparisons, analyses: Analyses, tokens: Record, reference: Record) -> str:
    """The report as Markdown.

    Args:
        results, comparisons, analyses: of the same runs.
        tokens: the metadata of the token shards.
        reference: the published numbers.
    """
    cards = {name: card(results, comparisons, variant) for name, variant in results.variants.items()}
    made, varying = checks(results, analyses), {name: one for name, one in analyses.topology.items() if _varies(one)}
    domains = next((found["domains"] for found in varying.values() if found["domains"]), None)
    fractions = sorted(analyses.removal["fraction"].unique())
    seeds = comparisons.seeds["seeds"]
    return render(
        "dagformer.md",
        {
            "results": results,
            "variants": results.variants,
            "cards": cards,
            "comparisons": comparisons,
            "analyses": analyses,
            "reference": reference,
            "setup": results.setup,
            "shared": shared_text(tokens["splits"]["test"]),
            "tokens": tokens,
            "num_documents": len(set(results.documents.tolist())),
            "rules": {"significant": SIGNIFICANT, "within": WITHIN, "moved": MOVED, "nearly_open": NEARLY_OPEN},
            "steps": {name: shown_steps(variant.curve) for name, variant in results.variants.items()},
            "findings": {
                "S1_passed": "S1" in cards and max(map(abs, cards["S1"]["away"].values())) <= WITHIN,
                "S2_moved": "S2" in cards and gates_moved(results.variants["S2"]),
                "S2flip_moved": "S2flip" in cards and gates_moved(results.variants["S2flip"]),
                "S2_answer": next((row["answer"] for row in comparisons.primary if row["left"] == ["S2"]), None),
                "P2_gained": "P2" in cards and comparisons.hard.loc["P2", "reference_high"] < 0,
                "L0_planted": _interval(comparisons.hard.loc[L0_PLANTED], *COLUMNS["reference"])
                if L0_PLANTED in results.planted
                else None,
                "L0_raised": "L0" in cards and comparisons.hard.loc["L0", "reference_low"] > 0,
                "varying": list(varying),
                "constant": [name for name in analyses.topology if name not in varying],
                "orders": clear_orders(analyses.removal),
                "spread": comparisons.seeds["window"]["hard"]["spread"] if len(seeds) > 1 else None,
                "alarms": alarms(results),
                "failed": [check["check"] for check in made if check["failed"]],
                "joint": JOINT if set(JOINT) <= set(cards) else None,
            },
            "columns": {  # that depend on the results
                "seeds": seed_columns(comparisons.seeds),
                "control_seeds": seed_columns(comparisons.control_seeds),
                "fractions": [(f"{fraction:g}", f"{fraction:.0%}") for fraction in fractions],
                "sources": [(("of", source), source, ".3f") for source in domains["sources"]] if domains else [],
            },
            "domains": domains,
            "rows": {
                "primary": [primary_row(row) for row in comparisons.primary],
                "variants": list(cards.values()),
                **{name: group_rows(cards, members) for name, members in GROUPS.items()},
                "others": [cards[name] for name in others(results)],
                "reading": reading_rows(varying),
                "variation": variation_rows(varying),
                "domains": [row for name, found in varying.items() for row in domain_rows(name, found["domains"])],
                "distances": source_distances(domains),
                "domain_pairs": domain_pairs(domains),
                "removal": removal_rows(analyses.removal, "mean", "low", "high"),
                "over_random": removal_rows(
                    analyses.removal[analyses.removal["order"] != "random"],
                    *("over_random", "low_over_random", "high_over_random"),
                ),
                "alone": alone_rows(analyses),
                "known": known_rows(analyses.planted),
                "methods": method_rows(results, analyses.methods),
                "control_seeds": seed_rows(comparisons.control_seeds),
                "seeds": seed_rows(comparisons.seeds),
                "checks": made,
            },
        },
    )


def summary(results: Results, comparisons: Comparisons, analyses: Analyses) -> dict[str, Any]:
    """The numbers that people ask for first."""
    window = results.main.evaluation["window"]
    return {
        "nll_baseline": window["nll_baseline"],
        "nll_P1": window["nll_hard"],
        "hard_density_P1": window["density_hard"],
        **{f"{row['id']}_difference": row["mean"] for row in comparisons.primary},
        "failed_checks": sum(check["failed"] for check in checks(results, analyses)),
    }


def card(results: Results, comparisons: Comparisons, variant: Variant) -> dict[str, Any]:
    """All that tables show of a variant: its knobs, and its evaluation in hard mode by the window protocol."""
    knobs, window, peer = variant.knobs, variant.evaluation["window"], results.reference(variant)
    changes = {key: value for key, value in variant.changes(results.main).items() if key != "validate_every"}
    cascade = "off" if knobs["cascade"] == "off" else f"k={knobs['cascade_k']:g} {knobs['cascade']}"
    tau, weight = (f"{knobs[f'{name}_init']:g}→{knobs[f'{name}_final']:g}" for name in ("tau", "lambda"))
    health = variant.training["health"]
    health = health if health == "healthy" else f"**{health}**"
    notes = ["full rank"] if knobs["rank"] >= variant.run["num_layers"] * variant.run["num_heads"] else []
    notes += [count(knobs["steps"], "step")] if "steps" in changes else []
    notes += [health] if health != "healthy" else []
    differences = {
        protocol: {
            mode: {
                side: _interval(comparisons.differences.loc[(variant.name, protocol, mode)], *columns)
                for side, columns in COLUMNS.items()
            }
            for mode in MODES
        }
        for protocol in PROTOCOLS
    }
    hard = differences["window"]["hard"]
    return {
        **window,
        **knobs,
        "id": variant.name,
        "from": variant.run["from"],
        "tokens": variant.training["tokens"],
        "cascade_k": window["cascade_k"],
        "config": f"r={knobs['rank']}, tau={tau}, cascade {cascade}, lambda={weight}",
        "budget": f"{variant.training['tokens']:,} ({count(variant.training['steps'], 'step')} of "
        f"{knobs['batch_size']} x {results.setup['seq_len']})",
        "changes": ", ".join(f"{key} {_plain(value)}" for key, value in changes.items()) or None,
        "peer": peer,
        "lambda": weight,
        "gate": cascade,
        "exempt": "exempt" if knobs["exempt_first_layer"] else "gated",
        "sparsity": 1 - window["density_hard"],
        "away": {mode: window[f"nll_{mode}"] / window["nll_baseline"] - 1 for mode in MODES},
        "to_baseline": hard["baseline"],
        "to_reference": hard["reference"],
        "to_baseline_prefix": differences["prefix"]["hard"]["baseline"],
        "differences": differences,
        "health": health,
        "notes": ", ".join(["(reference)"] * results.is_main(variant) + notes),
    }


def alarms(results: Results) -> dict[str, list[str]]:
    """The variants whose training raised an alarm, by what it was."""
    found: dict[str, list[str]] = {}
    for name, variant in results.variants.items():
        if (health := variant.training["health"]) != "healthy":
            found.setdefault(f"{health}, {variant.training['health_reason']}", []).append(name)
    return found


def gates_moved(variant: Variant) -> bool:
    """Whether training took the gates away from where they started."""
    first, last = variant.curve.iloc[0], variant.curve.iloc[-1]
    return any(abs(last[key] - first[key]) > MOVED for key in ("validation_mean_A", "validation_density_hard"))


def shown_steps(curve: "pd.DataFrame") -> "pd.DataFrame":
    """At most MAX_STEPS rows of a curve, evenly spaced, the first and the last among them."""
    last = len(curve) - 1
    return curve.iloc[sorted({round(i * last / (MAX_STEPS - 1)) for i in range(MAX_STEPS)})]


def clear_orders(removal: "pd.DataFrame") -> dict[str, list[str]]:
    """Fractions at which an order's difference to the random one has an interval on one side of zero."""
    part = removal[removal["fraction"] < 1]  # without any edge there is no order
    sides = {"better": part["high_over_random"] < 0, "worse": part["low_over_random"] > 0}
    return {
        f"{order}_{side}": [f"{fraction:.0%}" for fraction in part.loc[(part["order"] == order) & holds, "fraction"]]
        for order in ("least_gradient", "expected_gain")
        for side, holds in sides.items()
    }


def primary_row(row: Record) -> dict[str, Any]:
    """A primary question and its answer."""
    left, right = (names[0] if len(names) == 1 else f"mean of {listed(names)}" for names in (row["left"], row["right"]))
    pair = f"{left}, minus {right}; {row['mode']}, {row['protocol']}"
    return {**row, "pair": pair, "interval": interval(row)}


def group_rows(cards: Mapping[str, dict[str, Any]], members: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of an ablation table: P1 among them, and P1 at their budget if that is another; none without an ablation."""
    names = [name for name in members if name in cards]
    if names == [MAIN]:
        return []
    peers = dict.fromkeys(cards[name]["peer"] for name in names if cards[name]["peer"] not in (None, MAIN))
    at = names.index(MAIN) + 1
    return [cards[name] for name in [*names[:at], *peers, *names[at:]]]


def others(results: Results) -> list[str]:
    """Variants without a table or section of their own, such as those that a user added."""
    known = {*SECTIONS, *(name for members in GROUPS.values() for name in members)}
    known.update(*(results.seeds(name) for name in (MAIN, CONTROL) if name in results.variants))
    known |= {results.reference(variant) for variant in results.variants.values()}
    return [name for name in results.variants if name not in known]


def reading_rows(topology: Mapping[str, Record]) -> list[dict[str, str]]:
    """What reading the scored tokens is worth, in hard mode."""
    return [
        {"id": name, **{key: interval(test) for key, test in found["reading"]["hard"].items()}}
        for name, found in topology.items()
    ]


def variation_rows(topology: Mapping[str, Record]) -> list[dict[str, Any]]:
    """X1: how wirings vary, and how texts fare under their own wiring compared with others'."""
    return [
        {"id": name, **found["variation"]["window"]["soft"]}
        | {protocol: interval(found["swapped"][protocol]) for protocol in PROTOCOLS}
        for name, found in topology.items()
    ]


def domain_rows(name: str, found: Record | None) -> list[dict[str, Any]]:
    """X2: the tests of one variant."""
    if found is None:
        return []
    tests = [("separation, soft gates", found["soft"]["separation"], "+.4f")]
    tests += [("probe of soft gates", found["probe"], ".1%"), ("probe of the text vectors", found["text_probe"], ".1%")]
    return [
        {"id": name, "test": words, "p": test["p"]} | {key: format(test[key], how) for key in ("observed", "chance")}
        for words, test, how in tests
    ]


def source_distances(found: Record | None) -> list[dict[str, Any]]:
    """X2: mean distance from each source to each."""
    if found is None:
        return []
    means = (_by_source(found, row) for row in found["soft"]["mean_distances"])
    return [
        {"source": source, "documents": number, **row}
        for source, number, row in zip(found["sources"], found["documents"], means, strict=True)
    ]


def _by_source(found: Record, values: list[float]) -> dict[tuple[str, str], float]:
    """Values with keys of their own: a source may be called like a column."""
    return {("of", source): value for source, value in zip(found["sources"], values, strict=True)}


def domain_pairs(found: Record | None) -> list[dict[str, Any]]:
    """X2: the layer pairs that depend most on the source."""
    pairs = sorted(found["layer_pairs"] if found else [], key=lambda pair: -pair["explained"])[:SHOWN]
    return [
        pair | {"pair": f"{pair['source']} → {pair['target']}"} | _by_source(found, pair["means"]) for pair in pairs
    ]


def removal_rows(removal: "pd.DataFrame", *columns: str) -> list[dict[str, str]]:
    """X3: a row for each order, a column for each fraction."""
    rows = []
    for order, own in removal.groupby("order", sort=False):
        cells = {f"{row['fraction']:g}": _interval(row, *columns) for _, row in own.iterrows()}
        rows.append({"order": ORDERS[order], **cells})
    return rows


def alone_rows(analyses: Analyses) -> list[dict[str, Any]]:
    """X3: the layer pairs, then the heads, whose removal changes NLL most."""
    named = (
        (analyses.layer_pairs, "layers {source:.0f} → {target:.0f}"),
        (analyses.heads, "layer {layer:.0f}, head {head:.0f}"),
    )
    return [
        {"what": words.format(**row), "interval": interval(row), "documents": int(row["documents"])}
        for rows, words in named
        for row in rows.sort_values("mean", ascending=False, kind="stable").head(SHOWN).to_dict("records")
    ]


def known_rows(known: Record | None) -> list[dict[str, Any]]:
    """NLL of wirings of the planted base that need no training, minus that of the planted ones."""
    if known is None:
        return []
    return [
        {"wiring": words} | {protocol: interval(known[protocol]["minus_own"][key]) for protocol in PROTOCOLS}
        for key, words in KNOWN.items()
    ]


def method_rows(results: Results, methods: Record | None) -> list[dict[str, Any]]:
    """What each variant on the planted base found, hard gates, prefix protocol."""
    rows = []
    for name, variant in results.planted.items():
        found, knobs = methods[name]["prefix"], variant.knobs
        rows.append(
            {
                "id": name,
                "gates": f"{knobs['gates'].replace('_', ' ')}, logit {knobs['init_logit']:g}, "
                f"tau {knobs['tau_init']:g}→{knobs['tau_final']:g}, lr {knobs['lr']:g}",
                "density": variant.evaluation["prefix"]["density_hard"],
                "above_own": interval(found["above_own"]),
                "escape": share(found["escape"]),
                "context": share(found["context"]),
                "identified": "{observed:.0%} ({chance:.0%}, p = {p:.2g})".format(**found["probe"]),
                "random": variant.evaluation["prefix"]["nll_random"] - variant.evaluation["prefix"]["nll_hard"],
            }
        )
    return rows


def seed_columns(seeds: Record) -> list[tuple[str, str, str]]:
    """A column for each seed."""
    return [(name, f"{name} (seed {seed})", "+.4f") for name, seed in seeds["seeds"].items()]


def seed_rows(seeds: Record) -> list[dict[str, Any]]:
    """NLL minus the baseline's by seed and protocol, hard mode."""
    if len(seeds["seeds"]) < 2:
        return []
    found = {protocol: seeds[protocol]["hard"] for protocol in PROTOCOLS}
    return [{"protocol": protocol, **own["differences"], "spread": own["spread"]} for protocol, own in found.items()]


def checks(results: Results, analyses: Analyses) -> list[dict[str, Any]]:
    """The outcome of every check that a stage made, over all variants."""
    records = [("prepare_base", "", results.base), ("analyze_sensitivity", "", analyses.sensitivity)]
    for name, variant in results.variants.items():
        records += [("train_dagformer", name, variant.training), ("evaluate_nll", name, variant.evaluation)]
    for name, variant in results.planted.items():
        records += [("train_dagformer", name, variant.training), ("evaluate_nll", name, variant.evaluation)]
    records += [("analyze_topology", name, found) for name, found in analyses.topology.items()]
    found: dict[tuple[str, str], list[tuple[str, bool | None]]] = {}
    for stage, variant, record in records:
        for name, passed in record["checks"].items():
            found.setdefault((stage, name), []).append((variant, passed))
    rows = []
    for (stage, name), outcomes in found.items():
        failed = [variant for variant, passed in outcomes if passed is not None and passed is not True]
        mark, made_by = outcome(False) if failed else outcome(outcomes[0][1]), f"`{stage}`"
        if outcomes[0][0]:  # a stage of each variant
            made_by += f" ({count(len(outcomes), 'variant')})"
            mark += f" {listed(failed)}" if failed else ""
        rows.append({"outcome": mark, "failed": bool(failed), "check": name.replace("_", " "), "stage": made_by})
    return rows


def _interval(row: "pd.Series", *columns: str) -> str:
    """The interval in three columns of a row; a dash where they are empty."""
    values = [row[column] for column in columns]
    return interval(None if values[0] != values[0] else dict(zip(("mean", "low", "high"), values, strict=True)))


def _varies(found: Record) -> bool:
    return found["variation"]["window"]["soft"]["distinct"] > 1


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
