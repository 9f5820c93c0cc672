"""The report's sections on the analyses say what their files say, and their rules have an answer for each outcome."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from dwr_tree import edit_csv, edit_json, edit_yaml
from test_dagformer_report import keep, refusal, report, row_of, section, table_rows

from dynaroute.config import load_settings

pytestmark = pytest.mark.usefixtures("dagformer_tree")

REPORTS, STATISTICS = Path("reports/dagformer"), Path("reports/statistics")
SENSITIVITY = REPORTS / "sensitivity.json"


def glance(start: str) -> str:
    return next(line for line in section(report(), "At a glance").splitlines() if line.startswith(f"- {start}"))


def edit_topology(name: str, change) -> None:
    edit_json(REPORTS / name / "topology.json", change)


# --- X1 ------------------------------------------------------------------------------------------------------------


def test_wirings_that_serve_their_text_that_only_vary_and_one_for_all_are_told_apart():
    edit_topology("P1", lambda data: data["swapped"]["window"].update(mean=-0.02, low=-0.03, high=-0.01, p=0.02))
    edit_topology("A9", lambda data: data["swapped"]["window"].update(p=0.03))  # 0.06 after correction
    lines = [line for line in section(report(), "At a glance").splitlines() if line.startswith("- X1")]
    own = "wirings vary (mean distance 0.1357); a text's own wiring serves it better than another text's"
    numbers = (
        "(window protocol: -0.0200 [-0.0300, -0.0100], n = 37, p = 0.04); that a text's own wiring serves it better"
    )
    assert lines[0].startswith(f"- X1: P1: {own} {numbers} is not shown (prefix protocol")
    assert lines[1].startswith(
        "- X1: A9: wirings vary (mean distance 0.0678); that a text's own wiring serves it better"
    )
    assert lines[2] == "- X1: C1: no, one wiring for all 12 texts."


def test_a_text_may_be_served_worse_by_its_own_wiring():
    edit_topology("P1", lambda data: data["swapped"]["prefix"].update(mean=0.02, p=0.001))
    assert "serves it worse than another text's (prefix protocol: +0.0200" in glance("X1: P1")


def test_alike_wirings_of_one_text_decide_nothing():
    before = glance("X1: P1")
    edit_topology("P1", lambda data: data["same_text"]["soft"].update(p=0.9))
    assert glance("X1: P1") == before


def test_every_measure_of_variation_is_shown():
    values = {"gate_variance": 0.04321, "distance_mean": 0.4321, "distance_variance": 0.06543}
    values |= {"entropy_bits": 0.3579, "information_bits": 0.7654, "effective_rank": 11.1, "distinct": 1234}
    edit_topology("A9", lambda data: data["variation"]["window"]["hard"].update(values))
    rows = [row for row in table_rows(section(report(), "X1")) if row[:2] == ["A9", "hard"]]
    assert rows[0][2:] == ["0.04321", "0.4321", "0.06543", "0.3579", "0.7654", "11.1", "1,234"]


# --- X2 ------------------------------------------------------------------------------------------------------------


def test_domains_are_told_or_not():
    assert "differ more between sources than within (p = 0.0004) and tell the source (p = 0.0004)" in glance("X2: P1")
    assert "a linear probe's balanced accuracy is 90.0%, 49.0% by chance" in glance("X2: P1")
    assert "are not shown to differ more between sources than within (p = 0.31)" in glance("X2: A9")
    text = section(report(), "X2")
    assert "**P1**: mean distance from source to source" in text
    assert "**A9**" not in text
    nothing = {"observed": 0.5, "chance": 0.5, "p": 0.9}
    edit_topology("P1", lambda data: data["domains"].update(probe=nothing, soft=data["domains"]["hard"]))
    edit_topology("P1", lambda data: data["domains"]["soft"].update(separation=nothing))
    assert "**P1**: mean distance from source to source" in section(report(), "X2")  # P1's are always shown


def test_layer_pairs_that_differ_by_source_come_first_with_their_means():
    def change(data):
        data["domains"]["layer_pairs"][3].update(explained=0.87654, p_holm=0.0001, means=[0.1234, 0.9876])

    edit_topology("P1", change)
    text = section(report(), "X2")
    pair = row_of(text, "1 → 2")
    assert pair[1:] == ["87.7%", pair[2], "0.0001", "0.123", "0.988"]
    assert "6 of 6 layer pairs differ by source" in text
    titles = [row[0] for row in table_rows(text) if "→" in row[0]]
    assert titles[0] == "1 → 2"


def test_text_of_one_source_has_no_domains():
    for name in ("P1", "A9", "C1"):
        edit_topology(name, lambda data: data.__setitem__("domains", None))
    text = report()
    assert "no two sources" in section(text, "X2")
    assert "X2:" not in section(text, "At a glance")


# --- X3 ------------------------------------------------------------------------------------------------------------


def test_flat_or_not():
    assert glance("X3").startswith(
        "- X3: That NLL is not flat at A = 1 is not shown (mean gradient of all gates together p = 0.24 by document"
    )
    edit_json(SENSITIVITY, lambda data: data["flatness"].update(slopes=True, p=0.0002, harmful=0.25, helpful=0.125))
    assert "NLL is not flat at A = 1 (mean gradient of all gates together p = 0.0002" in glance("X3")
    assert "certain: 37.5% of 54; n = 53 windows of 17 documents)" in glance("X3")
    assert (
        row_of(section(report(), "X3"), "gates whose gradient says that closing them would help, after correction")[1]
        == "25.0%"
    )


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("removal", 6, "expected gain first 10%"),
        ("removal_layer_pairs", 1, "layers 0 → 2"),
        ("removal_heads", 4, "head 1, 1"),
    ],
)
def test_removals_that_help_are_named_and_so_is_that_there_are_none(name, row, words):
    none = "No removal is shown to lower NLL, of 27 removals, by order and fraction, layer pair or head. Removing 100%"
    assert f"{none} of edges changes NLL by +0.1500" in glance("X3")
    lower = dict(zip(["difference", "low", "high"], [-0.02, -0.03, -0.01], strict=True))
    edit_csv(REPORTS / f"{name}.csv", lambda rows: rows.__setitem__("p_corrected", 0.06))
    edit_csv(REPORTS / f"{name}.csv", lambda rows: rows.loc.__setitem__((row, list(lower)), list(lower.values())))
    assert none in glance("X3")  # not after correction
    edit_csv(REPORTS / f"{name}.csv", lambda rows: rows.loc.__setitem__((row, "p_corrected"), 0.04))
    assert f"layer pair or head: {words} (-0.0200 [-0.0300, -0.0100], n = 13)." in glance("X3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((-0.02, -0.03), "Gradients foretell the right sign: closing"),
        ((0.02, 0.03), "Gradients foretell the wrong sign: closing"),
        ((-0.02, 0.03), "Gradients foretell the sign for some fractions of edges and the wrong one for others: "),
        (None, "That gradients foretell the sign, right or wrong, is not shown: "),
    ],
)
def test_whether_gradients_foretell_the_sign_is_a_sentence(changes, words):
    def change(rows: pd.DataFrame) -> None:
        own = (rows["order"] == "expected_gain") & (rows["fraction"] < 1)
        rows.loc[own, "p_corrected"] = 0.06 if changes is None else 0.01
        if changes is not None:
            rows.loc[own, "difference"] = changes
        rows.loc[rows["fraction"] == 1, "difference"] = -0.5  # all edges: no order is left, so it says nothing of it

    edit_csv(REPORTS / "removal.csv", change)
    assert words in glance("Signs of gradients")
    assert words in section(report(), "X3")


def test_the_orders_of_removal_are_compared_with_the_random_one():
    assert "least gradient first: no difference is shown at 10% (+0.0010" in section(report(), "X3")

    def change(data):
        data["removal"]["orders"][2].update(difference=0.0306, low=0.02, high=0.04, p_corrected=0.003)

    edit_json(SENSITIVITY, change)
    expected = "expected gain first: is worse at 10% (+0.0306 [+0.0200, +0.0400], p = 0.003), no difference is shown"
    assert expected in section(report(), "X3")
    edit_json(SENSITIVITY, lambda data: data["removal"].update(orders=[]))
    assert "no order is compared" in section(report(), "X3")


@pytest.mark.parametrize(
    ("own", "after", "words"),
    [
        ((-0.4, 0.01), (-0.1, 0.01), "keeps 25% [10%, 40%] of the gain (bootstrap of documents): some of it is"),
        (
            (-0.4, 0.01),
            (-0.1, 0.06),
            "(bootstrap of documents): that any of it carries over is not shown",
        ),
        ((-0.4, 0.01), (0.1, 0.01), "(bootstrap of documents): these gates are shown to harm it"),
        ((-0.4, 0.06), (-0.1, 0.01), "A gain is not shown, so there is nothing to explain"),
    ],
)
def test_how_much_of_the_oracle_is_memorised(own, after, words):
    def change(data):
        for text, (difference, p) in (("same", own), ("next", after)):
            data["oracle"][text].update(difference=difference, p_corrected=p)
        data["oracle"]["carried_over"].update(mean=0.25, low=0.1, high=0.4)

    edit_json(SENSITIVITY, change)
    assert words in glance("Gates optimised directly")
    assert words in section(report(), "X3")


def test_what_single_removals_could_have_shown_is_said():
    edit_json(SENSITIVITY, lambda data: data["removal"]["heads"].update(detectable=0.0567))
    assert "A change of 0.0567 (median) would be shown four times in five" in section(report(), "X3")


def test_the_layer_pairs_and_heads_that_matter_most_are_shown_with_corrected_verdicts():
    edit_csv(REPORTS / "removal_heads.csv", lambda rows: rows.__setitem__("difference", range(len(rows))))
    edit_csv(REPORTS / "removal_heads.csv", lambda rows: rows.__setitem__("p_corrected", 0.0123))
    text = section(report(), "X3")
    heads = [row for row in table_rows(text.split("**Heads**", 1)[1]) if re.fullmatch(r"\d, \d", row[0])]
    assert [row[0] for row in heads] == ["3, 2", "3, 1", "3, 0", "2, 2", "2, 1"]
    assert all(row[2:] == ["0.012", "worse"] for row in heads)
    pairs = [row for row in table_rows(text) if "→" in row[0]]
    assert pairs[0][0] == "0 → 3"
    assert pairs[0][-1] == "worse"


# --- protocols, joint training, seeds, statistics ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "p", "words"),
    [
        (-0.02, 0.02, "lowers"),
        (0.02, 0.02, "raises"),
        (-0.02, 0.03, "is not shown to change"),  # 0.06 after correction for the two modes
        (0.001, 0.02, "raises"),  # its interval over windows, which are taken as independent, holds 0
    ],
)
def test_what_reading_the_answer_is_worth_is_judged_by_document_and_corrected(mean, p, words):
    def change(data):
        data["reading"]["soft"]["read_minus_not_read"].update(p=0.9)
        data["reading"]["hard"]["read_minus_not_read"].update(mean=mean, low=mean - 0.01, high=mean + 0.01, p=p)

    edit_topology("P1", change)
    sentence = f"and {words} hard NLL ({mean:+.4f} [{mean - 0.01:+.4f}, {mean + 0.01:+.4f}], n = 37, p = {2 * p:.2g})"
    assert sentence in section(report(), "What reading the answer is worth")


@pytest.mark.parametrize("verdict", ["better", "worse", "no difference shown"])
def test_joint_training_has_its_outcome_after_correction(verdict):
    def change(rows: pd.DataFrame) -> None:
        rows.loc[rows["family"] == "joint", "verdict"] = verdict

    edit_csv(STATISTICS / "comparisons.csv", change)
    line = (
        "J1 against J0, one seed of each: " + verdict + ": soft (window), hard (window), soft (prefix), hard (prefix)."
    )
    assert line in glance("Joint training")
    assert line in section(report(), "7. Joint training")


@pytest.mark.parametrize(("density", "open_gates"), [(0.9901, True), (0.99, False), (0.4, False)])
def test_joint_training_whose_gates_stayed_open_says_nothing_of_the_method(density, open_gates):
    edit_json(REPORTS / "J1/nll.json", lambda data: data["window"].update(density_hard=density))
    assert ("says nothing of the method" in glance("Joint training")) == open_gates
    assert f"{density:.1%} of J1's hard gates are open" in glance("Joint training")


def test_the_joint_base_is_also_shown_with_its_gates_open():
    edit_json(REPORTS / "J1/nll.json", lambda data: data["prefix"].__setitem__("nll_own_base", 1.2345))
    row = row_of(section(report(), "7. Joint"), "its own base with all gates at one, prefix protocol")
    assert row[1] == "1.2345"


def test_the_spread_over_seeds_is_shown():
    def change(data):
        data["prefix"]["hard"].update(spread=0.0987, mean=0.0456, low=-0.01, high=0.1)
        data["prefix"]["hard"]["differences"]["P1s2"] = 0.0777

    edit_json(STATISTICS / "seeds.json", change)
    text = section(report(), "Seeds")
    row = next(row for row in table_rows(text) if row[:2] == ["prefix", "hard"])
    assert row[4:7] == ["+0.0777", "0.0987", "+0.0456 [-0.0100, +0.1000]"]


@pytest.mark.parametrize("verdict", ["better", "worse", "no difference shown", "too close to say"])
@pytest.mark.parametrize(("pool", "size"), [("frozen base", 19), ("P1 over seeds", 3)])
def test_the_direction_of_all_together_is_at_a_glance_whatever_it_is(pool, size, verdict):
    def change(rows: pd.DataFrame) -> None:
        own = (rows["family"] == "direction") & (rows["ours"] == pool)
        rows.loc[own, "verdict"] = verdict
        rows.loc[own & (rows["protocol"] == "prefix"), ["mean", "p_corrected", "p_error"]] = [-0.0777, 0.0444, 0.0022]

    edit_csv(STATISTICS / "comparisons.csv", change)
    line = glance(f"Direction, {pool}")
    assert f"{size} variants averaged window by window, against the baseline: {verdict}: soft (window), hard" in line
    assert "-0.0777 by the prefix protocol" in line
    rows = [row for row in table_rows(section(report(), "8. Statistics")) if row[:3] == [pool, str(size), "prefix"]]
    assert [row[-1] for row in rows] == [f"{verdict} (p = 0.044 ± 0.002)"] * 2


def test_the_direction_says_how_many_lie_above_the_baseline():
    def change(data):
        data["window"]["soft_minus_baseline"]["mean"] = -0.001

    for name in ("P1s1", "A4", "J1"):  # J1 has another base
        edit_json(REPORTS / name / "nll.json", change)
    above = sum(
        json.loads((REPORTS / name / "nll.json").read_text())["window"]["soft_minus_baseline"]["mean"] > 0
        for name in set(load_settings().variants) - {"J1", "J0"}
    )
    assert f"above the baseline's with {above} of the 19)" in glance("Direction, frozen base")
    assert "above the baseline's with 2 of the 3)" in glance("Direction, P1 over seeds")


def test_what_other_flips_could_turn_is_counted():
    def change(rows: pd.DataFrame) -> None:
        rows.loc[5, ["p_corrected", "p_error", "verdict"]] = [0.0512, 0.0034, "too close to say"]

    edit_csv(STATISTICS / "comparisons.csv", change)
    text = section(report(), "8. Statistics")
    assert "is too close to say: 1 of" in text
    assert "0.0512 ± 0.003." in text
    assert "too close to say in some mode and protocol: S2" in glance("After correction")


def test_one_seed_has_no_spread():
    keep(["P1", "C1", "A9"])
    assert "P1 was run with one seed: its spread is not known." in section(report(), "Seeds")


def test_verdicts_are_counted_before_and_after_correction():
    def change(rows: pd.DataFrame) -> None:
        own = rows["family"] == "reference"
        rows.loc[own, ["mean", "low", "high"]] = [-0.02, -0.03, -0.01]
        rows.loc[own, "verdict"] = "no difference shown"

    edit_csv(STATISTICS / "comparisons.csv", change)
    row = row_of(section(report(), "8. Statistics"), "every ablation but C1 against P1")
    assert row[1:] == ["56", "56 → 0", "0 → 0", "0 → 56", "0 → 0"]


def test_what_lies_under_p1_against_the_baseline_is_shown():
    def change(rows: pd.DataFrame) -> None:
        own = (rows["family"] == "baseline") & (rows["ours"] == "P1") & (rows["protocol"] == "prefix")
        rows.loc[own, ["bootstrap_low", "bootstrap_high", "p", "p_corrected"]] = [-0.1111, 0.2222, 0.0333, 0.4444]
        rows.loc[own, "effect_size"] = [float("nan"), -1.5]
        rows.loc[own, "detectable"] = 0.0555

    edit_csv(STATISTICS / "comparisons.csv", change)
    rows = [row for row in table_rows(section(report(), "8. Statistics")) if row[0] == "prefix"]
    assert [row[3] for row in rows] == ["[-0.1111, +0.2222], p = 0.033, 19 documents"] * 2
    assert all("(p = 0.44 ± 0.001)" in row[4] for row in rows)
    assert [row[5:] for row in rows] == [["–", "0.0555", "37"], ["-1.50", "0.0555", "37"]]


# --- inputs that are missing, damaged or of another run -----------------------------------------------------------

FILES = [
    *(REPORTS / name for name in ("P1/topology.json", "sensitivity.json", "gate_gradients.csv", "removal.csv")),
    *(REPORTS / name for name in ("removal_layer_pairs.csv", "removal_heads.csv")),
    *(STATISTICS / name for name in ("comparisons.csv", "seeds.json")),
]


@pytest.mark.parametrize("path", FILES, ids=str)
@pytest.mark.parametrize("content", [None, b"", b"["])
def test_a_missing_or_damaged_analysis_is_named(path, content):
    path.unlink() if content is None else path.write_bytes(content)
    assert refusal().startswith(str(path))


def test_analyses_of_other_runs_are_refused():
    edit_topology("A9", lambda data: data.__setitem__("run", "fedcba"))
    assert refusal() == f"{REPORTS / 'A9/topology.json'}: belongs to run fedcba, not a90123456789abcd: run dvc repro"
    edit_topology("A9", lambda data: data.__setitem__("run", "a90123456789abcd"))
    edit_json(SENSITIVITY, lambda data: data.__setitem__("base", "c" * 64))
    assert refusal().startswith(f"{SENSITIVITY}: of another base than data/dagformer/P1/run.json")


def test_comparisons_of_variants_that_are_no_more_are_refused():
    edit_yaml("params.yaml", lambda params: params["variants"].pop("A4"))
    assert refusal().startswith(f"{STATISTICS / 'comparisons.csv'}: not of the variants of params.yaml")


def test_p1_must_be_analysed():
    edit_yaml("params.yaml", lambda params: params["analysis"].update(variants=["A9"]))
    assert refusal() == "analysis.variants: the report shows P1, which params.yaml does not list"
    assert load_settings().analysis.variants == ["A9"]


def test_text_that_the_splits_share_is_said_to_be_shared():
    path = "data/tokens/docs/metadata.json"
    edit_json(path, lambda data: data["splits"]["test"].__setitem__("share_in_train", 0.1234))
    for title in ("1. What was run", "6. Analysis experiments"):
        assert "12.3%, in spans of 32 tokens or longer" in section(report(), title)
    edit_json(path, lambda data: data["splits"]["test"].__setitem__("share_in_train", None))
    assert "also stand in the training split: not looked for" in section(report(), "6. Analysis experiments")
