"""Differences between variants on the same held-out windows: the primary questions, estimates, and seeds.

n windows
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dynaroute.analysis.statistics import answer, detectable_difference, holm, paired_difference, sign_flip_p
from dynaroute.config.dagformer import BASELINE, CONTROLS, MODES, PROTOCOLS, Question

NLL = Callable[[str, str, str], np.ndarray]  # [n] of a variant in a mode (or the baseline) by a protocol
UNANSWERABLE = "cannot be answered at this scale"


def primary_answers(
    questions: Mapping[str, Question], nll: NLL, documents: np.ndarray, headroom: Mapping[str, float], seed: int
) -> list[dict[str, Any]]:
    """The primary questions, each tested once by sign flips of whole documents, corrected for their number by Holm.

    Args:
        questions: by id.
        nll: of every variant they name.
        documents: [n], the document of each window.
        headroom: by question, how far apart its sides could be at all, in nats per token. A question that shows no
            difference is unanswerable if not even that much could have been detected.
        seed: of the flips.

    Returns:
        A row for each question: its id and settings; mean, low, high of left - right; documents; p, p_corrected;
        detectable, the true difference that would be found four times in five; headroom; answer.
    """
    rows = []
    for key, question in questions.items():
        left = _mean(nll(name, question.mode, question.protocol) for name in question.left)
        if question.right[0] in CONTROLS:
            right = _mean(nll(name, question.right[0], question.protocol) for name in question.left)
        else:
            right = _mean(nll(name, question.mode, question.protocol) for name in question.right)
        found = paired_difference(left, right, documents)
        rows.append(
            {"id": key, **question.model_dump(), "mean": found.mean, "low": found.low, "high": found.high}
            | {"documents": found.n, "p": sign_flip_p(left, right, documents, seed)}
            | {"detectable": detectable_difference(left, right, documents, len(questions)), "headroom": headroom[key]}
        )
    for row, corrected in zip(rows, holm([row["p"] for row in rows]).tolist(), strict=True):
        shown = answer(row["mean"], corrected)
        small = shown == "no detectable difference" and row["detectable"] > row["headroom"]
        row |= {"p_corrected": corrected, "answer": UNANSWERABLE if small else shown}
    return rows


def differences(references: Mapping[str, str | None], nll: NLL, documents: np.ndarray) -> list[dict[str, Any]]:
    """Every variant's NLL minus the baseline's, its reference's and, with hard gates, those of equally dense wirings.

    With intervals by document, and without verdicts.

    Args:
        references: by variant, the one it is compared with, if any.
        nll: of every variant.
        documents: [n], the document of each window.

    Returns:
        A row for each variant, protocol and mode; empty cells where there is no reference.
    """
    rows = []
    for name, reference in references.items():
        for protocol in PROTOCOLS:
            baseline = nll(name, BASELINE, protocol)
            for mode in MODES:
                own = nll(name, mode, protocol)
                row = {"variant": name, "protocol": protocol, "mode": mode, "nll": float(own.mean())}
                row |= _columns("", own, baseline, documents) | {"reference": reference}
                row |= _columns("reference_", own, reference and nll(reference, mode, protocol), documents)
                for control in ("random", "least_gradient"):
                    theirs = nll(name, control, protocol) if mode == "hard" else None
                    row |= _columns(f"{control}_", own, theirs, documents)
                rows.append(row)
    return rows


def seed_spread(seeds: Mapping[str, int], nll: NLL) -> dict[str, Any]:
    """How much of a variant's difference to the baseline depends on its seed; the baseline has none.

    Args:
        seeds: by variant; variants that differ in nothing else.
        nll: of every one of them.

    Returns:
        seeds; and by protocol and mode, if there are several: differences, by variant; spread, their standard
        deviation.
    """
    found: dict[str, Any] = {"seeds": dict(seeds)}
    for protocol in PROTOCOLS if len(seeds) > 1 else ():
        found[protocol] = {}
        for mode in MODES:
            own = {name: float((nll(name, mode, protocol) - nll(name, BASELINE, protocol)).mean()) for name in seeds}
            found[protocol][mode] = {"differences": own, "spread": float(np.std(list(own.values()), ddof=1))}
    return found


def _columns(
    prefix: str, ours: np.ndarray, theirs: np.ndarray | None, documents: np.ndarray
) -> dict[str, float | None]:
    names = [f"{prefix}{part}" for part in ("difference", "low", "high")]
    if theirs is None:
        return dict.fromkeys(names)
    return dict(zip(names, paired_difference(ours, theirs, documents), strict=False))


def _mean(values: Iterable[np.ndarray]) -> np.ndarray:
    values = list(values)
    return sum(values) / len(values)
