"""The stage that compares all variants: which pairs, on which windows, corrected within which family."""

import json
from pathlib import Path

import compare_variants as stage
import numpy as np
import pandas as pd
import pytest
from dagformer_tree import WINDOWS
from dwr_tree import edit_csv, edit_yaml

from dynaroute.analysis.statistics import compare, settled_westfall_young
from dynaroute.config import load_settings

pytestmark = pytest.mark.usefixtures("dagformer_tree")

REPORTS, STATISTICS = Path("reports/dagformer"), Path("reports/statistics")
DOCUMENTS = np.arange(WINDOWS) // 2


@pytest.fixture
def compared(monkeypatch):
    """Runs the stage on windows of six documents, and returns its rows."""
    monkeypatch.setattr(stage, "TokenShards", lambda *_: None)
    monkeypatch.setattr(stage, "main_documents", lambda shards, seq_len, windows: np.array(windows) // 2)

    def compared() -> pd.DataFrame:
        stage.main(load_settings())
        return pd.read_csv(STATISTICS / "comparisons.csv")

    return compared


def nll(name: str, mode: str, protocol: str) -> np.ndarray:
    rows = pd.read_csv(REPORTS / name / "nll.csv")
    return rows.loc[rows["protocol"] == protocol, f"nll_{mode}"].to_numpy()


def test_every_family_has_its_pairs(compared):
    rows = compared()
    pairs = {family: list(zip(own["ours"], own["theirs"], strict=True)) for family, own in rows.groupby("family")}
    names = list(load_settings().variants)
    assert set(pairs["baseline"]) == {(name, "baseline") for name in names}
    others = set(names) - {"P1", "P1s1", "P1s2", "J1", "J0"}
    own = others - {"S1", "C1"}  # S1 has a budget of its own, and C1 a family
    assert {ours for ours, _ in pairs["reference"]} == own
    assert set(pairs["direction"]) == {("frozen base", "baseline"), ("P1 over seeds", "baseline")}
    assert {theirs for _, theirs in pairs["reference"]} == {"P1"}
    assert set(pairs["control"]) == {(name, "C1") for name in ("P1", "P1s1", "P1s2")}
    assert set(pairs["joint"]) == {("J1", "J0")}
    assert len(rows) == 4 * sum(len(set(own)) for own in pairs.values())


def test_no_question_is_tested_twice(compared):
    rows = compared()
    asked = [
        frozenset((row.ours, row.theirs)) for row in rows.drop_duplicates(["family", "ours", "theirs"]).itertuples()
    ]
    assert len(asked) == len(set(asked))


def test_a_direction_is_of_the_average_over_its_variants_window_by_window(compared):
    rows = compared().set_index(["family", "ours", "protocol", "mode"])
    names = set(load_settings().variants) - {"J1", "J0"}  # whose base was trained
    for pool, members in (("frozen base", names), ("P1 over seeds", {"P1", "P1s1", "P1s2"})):
        ours = np.mean([nll(name, "soft", "prefix") for name in members], axis=0)
        expected = compare(ours, nll("P1", "baseline", "prefix"), DOCUMENTS, load_settings().seed)
        found = rows.loc[("direction", pool, "prefix", "soft")]
        for name in ("mean", "low", "high", "n", "bootstrap_low", "groups", "p"):
            assert found[name] == pytest.approx(getattr(expected, name)), (pool, name)


def test_a_row_is_the_comparison_of_those_two_on_the_same_windows(compared):
    rows = compared().set_index(["family", "ours", "protocol", "mode"])
    for key, theirs in (
        (("baseline", "A3", "prefix", "soft"), nll("A3", "baseline", "prefix")),
        (("reference", "A3", "window", "hard"), nll("P1", "hard", "window")),
        (("joint", "J1", "prefix", "hard"), nll("J0", "hard", "prefix")),
    ):
        _, ours, protocol, mode = key
        expected = compare(nll(ours, mode, protocol), theirs, DOCUMENTS, load_settings().seed)
        found = rows.loc[key]
        for name, value in expected._asdict().items():
            assert found[name] == pytest.approx(value), (key, name)


def test_p_values_are_corrected_within_their_family(compared):
    rows = compared()
    for family, own in rows[rows["family"] != "direction"].groupby("family"):
        differences = []
        for row in own.itertuples():
            baseline = row.theirs == "baseline"
            theirs = (row.ours, "baseline", row.protocol) if baseline else (row.theirs, row.mode, row.protocol)
            differences.append(nll(row.ours, row.mode, row.protocol) - nll(*theirs))
        expected = settled_westfall_young(np.stack(differences, axis=1), DOCUMENTS, load_settings().seed)
        assert own["p_corrected"].to_numpy() == pytest.approx(expected.p), family
        assert own["p_error"].to_numpy() == pytest.approx(expected.error), family
    certain = rows["p_corrected"] < 0.05
    assert (rows["verdict"][~certain] == "no difference shown").all()
    assert (rows["verdict"][certain] != "no difference shown").all()


def test_two_runs_write_the_same_bytes(compared):
    contents = []
    for _ in range(2):
        compared()
        contents.append([(STATISTICS / name).read_bytes() for name in ("comparisons.csv", "seeds.json")])
    assert contents[0] == contents[1]


def test_the_spread_over_seeds_is_that_of_their_differences(compared):
    for index, name in enumerate(("P1", "P1s1", "P1s2")):
        edit_csv(REPORTS / name / "nll.csv", lambda rows, i=index: rows.__setitem__("nll_soft", rows["nll_soft"] + i))
    compared()
    found = json.loads((STATISTICS / "seeds.json").read_text())
    assert found["seeds"] == {"P1": 0, "P1s1": 1, "P1s2": 2}
    own = found["prefix"]["hard"]
    # The evaluation's own differences, which reports show everywhere.
    means = [json.loads((REPORTS / name / "nll.json").read_text())["prefix"] for name in found["seeds"]]
    values = [mean["hard_minus_baseline"]["mean"] for mean in means]
    assert list(own["differences"].values()) == pytest.approx(values)
    assert own["spread"] == pytest.approx(np.std(values, ddof=1))
    margin = 4.302652729911275 * np.std(values, ddof=1) / np.sqrt(3)  # the 97.5 % quantile of t with 2 degrees
    assert own["high"] - own["mean"] == pytest.approx(margin)


def test_families_without_members_are_left_out(compared):
    def change(params: dict) -> None:
        params["variants"] = {"P1": {"from": "base"}}
        params["analysis"]["variants"] = ["P1"]

    edit_yaml("params.yaml", change)
    assert set(compared()["family"]) == {"baseline"}
    assert json.loads((STATISTICS / "seeds.json").read_text()) == {"seeds": {"P1": 0}}
