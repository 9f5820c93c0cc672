"""Primary questions are tested once and corrected together; all else is an estimate; seeds have a spread."""

import numpy as np
import pytest

from dynaroute.analysis.comparisons import differences, primary_answers, seed_spread
from dynaroute.analysis.statistics import detectable_difference, holm, paired_difference, sign_flip_p
from dynaroute.config.dagformer import Question

DOCUMENTS = np.arange(40) // 2
SHIFTS = {"good": -0.5, "bad": 0.5, "same": 0.0, "also_good": -0.4}


def nll(name: str, mode: str, protocol: str) -> np.ndarray:
    """NLL of 40 windows: the text's, and that of the variant, mode and protocol."""
    text = np.random.default_rng(0 if protocol == "window" else 1).normal(4, 1, 40)
    if mode == "baseline":
        return text
    noise = np.random.default_rng(sum(map(ord, name + mode + protocol))).normal(0, 0.3, 40)
    return text + SHIFTS[name] + noise


def question(left: list[str], right: list[str], mode: str = "hard", protocol: str = "window") -> Question:
    return Question(question="?", left=left, right=right, mode=mode, protocol=protocol)


def answers(*questions: Question, headroom: float = 9.0) -> list[dict]:
    asked = {f"q{i}": one for i, one in enumerate(questions)}
    return primary_answers(asked, nll, DOCUMENTS, dict.fromkeys(asked, headroom), 0)


def test_answers_are_those_of_the_tests_corrected_for_their_number():
    asked = (
        question(["good"], ["baseline"]),
        question(["bad"], ["same"], "soft", "prefix"),
        question(["same"], ["baseline"]),
    )
    found = answers(*asked)
    assert [row["answer"] for row in found] == ["better", "worse", "no detectable difference"]
    pairs = [
        (nll("good", "hard", "window"), nll("good", "baseline", "window")),
        (nll("bad", "soft", "prefix"), nll("same", "soft", "prefix")),
        (nll("same", "hard", "window"), nll("same", "baseline", "window")),
    ]
    p = [sign_flip_p(*pair, DOCUMENTS, 0) for pair in pairs]
    assert [row["p"] for row in found] == p
    assert [row["p_corrected"] for row in found] == holm(p).tolist()
    for row, pair in zip(found, pairs, strict=True):
        assert (row["mean"], row["low"], row["high"], row["documents"]) == paired_difference(*pair, DOCUMENTS)
        assert row["detectable"] == detectable_difference(*pair, DOCUMENTS, tests=3)


def test_several_variants_are_averaged_window_by_window():
    (found,) = answers(question(["good", "also_good"], ["bad", "same"]))
    left, right = (
        (nll(a, "hard", "window") + nll(b, "hard", "window")) / 2 for a, b in (("good", "also_good"), ("bad", "same"))
    )
    assert found["mean"] == pytest.approx((left - right).mean())


def test_a_question_is_unanswerable_only_where_nothing_shows_and_less_than_the_headroom_could_not():
    asked = question(["good"], ["baseline"]), question(["same"], ["baseline"])
    found = [row["answer"] for row in answers(*asked, headroom=1e-3)]
    assert found == ["better", "cannot be answered at this scale"]


def test_differences_are_estimates_against_baseline_and_reference():
    rows = differences({"good": "bad", "bad": None}, nll, DOCUMENTS)
    assert [(row["variant"], row["protocol"], row["mode"]) for row in rows] == [
        (name, protocol, mode)
        for name in ("good", "bad")
        for protocol in ("window", "prefix")
        for mode in ("soft", "hard")
    ]
    own = nll("good", "hard", "prefix")
    against = paired_difference(own, nll("bad", "hard", "prefix"), DOCUMENTS)
    to_baseline = paired_difference(own, nll("good", "baseline", "prefix"), DOCUMENTS)
    assert (rows[3]["difference"], rows[3]["low"], rows[3]["high"]) == to_baseline[:3]
    assert tuple(rows[3][f"reference_{part}"] for part in ("difference", "low", "high")) == against[:3]
    assert rows[3]["nll"] == pytest.approx(own.mean())
    assert rows[7]["reference"] is rows[7]["reference_low"] is None
    assert "verdict" not in rows[3] and "p" not in rows[3]


def test_the_spread_over_seeds_is_the_standard_deviation_of_their_differences():
    found = seed_spread({"good": 0, "also_good": 1}, nll)
    values = [(nll(name, "hard", "prefix") - nll(name, "baseline", "prefix")).mean() for name in found["seeds"]]
    assert list(found["prefix"]["hard"]["differences"].values()) == pytest.approx(values)
    assert found["prefix"]["hard"]["spread"] == pytest.approx(np.std(values, ddof=1))
    assert seed_spread({"good": 0}, nll) == {"seeds": {"good": 0}}
