"""The ablations, P1 beside them as reference; the layer-0 ablation and the control; all variants by both protocols."""

from collections.abc import Callable
from typing import NamedTuple

from dynaroute.analysis.statistics import Verdict
from dynaroute.reporting.dagformer.analyses import Analyses
from dynaroute.reporting.dagformer.results import JOINT, MODES, PROTOCOLS, REFERENCE_VARIANT, Results, Variant
from dynaroute.reporting.dagformer.setup import changes, health
from dynaroute.reporting.dagformer.wording import (
    TOPOLOGY,
    by_verdict,
    course,
    interval,
    numbers,
    published_steps,
    steps,
)
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, count, published, table


class Group(NamedTuple):
    """One ablation table: its variants in the order of its rows, what they set and what is measured beside NLL."""

    title: str
    members: tuple[str, ...]
    settings: dict[str, Callable[[Record], str]]  # of the knobs
    measures: dict[str, Callable[[Record], str]]  # of the evaluation by the window protocol


GROUPS = (
    Group(
        "A1–A4: rank r",
        ("A1", "A2", REFERENCE_VARIANT, "A3", "A4"),
        {"rank": lambda knobs: f"{knobs['rank']}"},
        {"sparsity": lambda found: f"{1 - found['density_hard']:.3f}"},
    ),
    Group(
        "A5–A7: temperature schedule",
        ("A5", REFERENCE_VARIANT, "A6", "A7"),
        {"tau_init": lambda knobs: f"{knobs['tau_init']:g}", "tau_final": lambda knobs: f"{knobs['tau_final']:g}"},
        {"A entropy (bits)": lambda found: f"{found['entropy_bits']:.3f}"},
    ),
    Group(
        "A8–A9: sparsity lambda",
        ("A8", REFERENCE_VARIANT, "A9"),
        {"lambda": lambda knobs: course(knobs["lambda_init"], knobs["lambda_final"])},
        {"density": lambda found: f"{found['density_hard']:.3f}", "mean_A": lambda found: f"{found['mean_A']:.3f}"},
    ),
    Group(
        "A10–A11: cascading gate",
        ("A10", REFERENCE_VARIANT, "A11"),
        {"gate": lambda knobs: "off" if knobs["cascade"] == "off" else f"k={knobs['cascade_k']:g} {knobs['cascade']}"},
        {
            "trained k": lambda found: NONE if found["cascade_k"] is None else f"{found['cascade_k']:.3f}",
            "dead heads": lambda found: f"{found['dead_heads']}",
        },
    ),
)
SECTIONS = ("S1", "S2", "P1", "P2", "L0", "C1", *JOINT)  # variants with a section of their own


def present(results: Results, group: Group) -> list[Variant]:
    """The group's own variants that were run, without the reference."""
    own = (results.variants.get(name) for name in group.members if name != REFERENCE_VARIANT)
    return [variant for variant in own if variant is not None]


def ablation(results: Results, analyses: Analyses, group: Group) -> str:
    """The table of a group of ablations, and what it shows."""
    own = present(results, group)
    rows: list[Variant] = []
    for name in group.members:
        if name == REFERENCE_VARIANT:  # and P1 at the budget of the ablations, where that is another one
            budgets = {variant.knobs["steps"] for variant in own}
            rows += [one for one in results.peers() if one is results.main or one.knobs["steps"] in budgets]
        elif name in results.variants:
            rows.append(results.variants[name])
    return f"{_table(results, rows, group)}\n\n{group_sentence(results, analyses, own)}"


def group_sentence(results: Results, analyses: Analyses, own: list[Variant]) -> str:
    """What the paired differences of ablations to their reference show."""
    found = {mode: _against_peers(results, analyses, own, mode) for mode in MODES}
    if not found["soft"]:
        return "P1 was not run at this budget, so nothing is compared with it."
    peers = {peer.name for variant in own if (peer := results.peer(variant)) is not None}
    lines = "; ".join(f"{mode} NLL: {by_verdict(differences)}" for mode, differences in found.items())
    return f"Against {' and '.join(sorted(peers))} on the same windows (window protocol): {lines}."


def _against_peers(results: Results, analyses: Analyses, own: list[Variant], mode: str) -> dict[str, Verdict]:
    names = [variant.name for variant in own if results.peer(variant) is not None]
    return {name: analyses.verdict("reference", name, mode, "window") for name in names}


def _table(results: Results, rows: list[Variant], group: Group) -> str:
    header = ["ID", *group.settings, *_NLL_HEADER, "hard - reference [95 %]", *group.measures, "notes"]
    cells = []
    for variant in rows:
        peer, found = results.peer(variant), variant.evaluation["window"]
        reference = variant in results.peers()
        against = None if reference or peer is None else variant.minus(peer, "hard", "window")
        cells.append(
            [
                variant.name,
                *(show(variant.knobs) for show in group.settings.values()),
                *_nll_cells(variant, "window"),
                interval(against),
                *(show(found) for show in group.measures.values()),
                _notes(results, variant, reference),
            ]
        )
    return table(header, cells)


_NLL_HEADER = ("NLL_soft", "soft - baseline [95 %]", "NLL_hard", "hard - baseline [95 %]")


def _nll_cells(variant: Variant, protocol: str) -> list[str]:
    return [
        cell
        for mode in MODES
        for cell in (f"{variant.nll(mode, protocol):.4f}", interval(variant.to_baseline(mode, protocol)))
    ]


def _notes(results: Results, variant: Variant, reference: bool) -> str:
    notes = ["(reference)"] if reference else []
    if variant.knobs["rank"] >= variant.nodes:
        notes.append("full rank")
    if variant.knobs["steps"] != results.main.knobs["steps"]:
        notes.append(count(variant.knobs["steps"], "step"))
    if variant.training["verdict"] != "healthy":
        notes.append(health(variant))
    return ", ".join(notes)


def first_layer(results: Results, analyses: Analyses, variant: Variant) -> str:
    """L0: the cascading gate without the exemption of layer 0, in place of the published preliminary data."""
    theirs = results.reference["first_layer_gated"]
    parts = [first_layer_sentence(results, analyses, variant)]
    rows = [one for one in (results.peer(variant), variant) if one is not None]
    header = ["ID", "layer 0", *_NLL_HEADER, "mean_A", "hard density"]
    cells = [
        [
            one.name,
            "exempt" if one.knobs["exempt_first_layer"] else "gated",
            *_nll_cells(one, "window"),
            f"{one.evaluation['window']['mean_A']:.3f}",
            f"{one.evaluation['window']['density_hard']:.3f}",
        ]
        for one in rows
    ]
    columns = ("train_loss", "validation_density_hard", "validation_tau")
    quoted = (
        f"By step, without the exemption ({theirs['source']}; mean_A there is over {theirs['mean_A_over']}, valid or "
        f"not):\n\n{published_steps(theirs['rows'])}"
    )
    parts += [table(header, cells), "By step, on validation windows:", steps(variant, *columns), published(quoted)]
    return "\n\n".join(parts)


def first_layer_sentence(results: Results, analyses: Analyses, variant: Variant) -> str:
    """What gating layer 0 does to hard NLL."""
    why = (
        "Layer 0 has no incoming connections by construction. A cascading gate that does not exempt it takes it for "
        "cut off, and in hard mode cuts all that it sends."
    )
    peer = results.peer(variant)
    if peer is None:
        words = analyses.verdict("baseline", variant.name, "hard", "window")
        return f"{why} Hard NLL against the baseline: {numbers(variant.to_baseline('hard', 'window'))}: {words}."
    found = variant.minus(peer, "hard", "window")
    outcome = {
        "worse": "Without the exemption hard NLL is worse",
        "better": "Without the exemption hard NLL is better",
    }.get(analyses.verdict("reference", variant.name, "hard", "window"), "No difference in hard NLL was shown here")
    return f"{why} {outcome}: {numbers(found)} against {peer.name}, by the window protocol."


def control(results: Results, analyses: Analyses, variant: Variant) -> str:
    """C1: one learned topology for all texts."""
    peer = results.peer(variant)
    header = ["ID", "protocol", *_NLL_HEADER]
    shown = [one for one in (peer, variant) if one is not None]
    parts = [
        control_sentence(results, analyses, variant),
        table(header, [[one.name, protocol, *_nll_cells(one, protocol)] for protocol in PROTOCOLS for one in shown]),
    ]
    if peer is not None:
        rows = [
            [protocol, *(interval(peer.minus(variant, mode, protocol)) for mode in MODES)] for protocol in PROTOCOLS
        ]
        parts.append(table(["protocol", *(f"{peer.name} - {variant.name}, {mode} [95 %]" for mode in MODES)], rows))
    return "\n\n".join(parts)


def control_sentence(results: Results, analyses: Analyses, variant: Variant) -> str:
    """What reading the text adds to one topology for all texts."""
    peer = results.peer(variant)
    if peer is None:
        return f"{variant.name} learns one topology for all texts; P1 was not run at its budget."
    found = {
        f"{mode} ({protocol})": analyses.verdict("control", peer.name, mode, protocol)
        for protocol in PROTOCOLS
        for mode in MODES
    }
    return (
        f"{variant.name} learns one topology for all texts. What reading the text adds, {peer.name} - {variant.name}: "
        f"{by_verdict(found)}. {variant.name} was run with one seed."
    )


def others(results: Results) -> list[Variant]:
    """Variants that have no place in the tables above, such as those that a user added."""
    known = {
        *SECTIONS,
        *(name for group in GROUPS for name in group.members),
        *(one.name for one in (*results.peers(), *results.seeds())),
    }
    return [variant for name, variant in results.variants.items() if name not in known]


def other_variants(results: Results) -> str:
    """Those, each with what it changes."""
    rows = []
    for variant in others(results):
        peer = results.peer(variant)
        rows.append(
            [
                variant.name,
                changes(variant, results.main),
                *_nll_cells(variant, "window"),
                interval(None if peer is None else variant.minus(peer, "hard", "window")),
                _notes(results, variant, reference=False),
            ]
        )
    return table(["ID", "differs from P1 in", *_NLL_HEADER, "hard - reference [95 %]", "notes"], rows)


def all_variants(results: Results, protocol: str) -> str:
    """NLL of all variants by a protocol."""
    rows = [[name, *_nll_cells(variant, protocol)] for name, variant in results.variants.items()]
    return table(["ID", *_NLL_HEADER], rows)


def topologies(results: Results) -> str:
    """What the gates of all variants look like."""
    rows = [
        [name, *(show(variant.evaluation["window"]) for _, show in TOPOLOGY), health(variant)]
        for name, variant in results.variants.items()
    ]
    return table(["ID", *(name for name, _ in TOPOLOGY), "training"], rows)


def ablation_sentence(results: Results, analyses: Analyses) -> str:
    """All ablations against P1 in hard mode, in one line."""
    own = [variant for group in GROUPS for variant in present(results, group)]
    found = _against_peers(results, analyses, own, "hard")
    if not found:
        return "No ablation was run at a budget of P1's."
    return f"Ablations against P1 in hard mode (window protocol): {by_verdict(found)}."
