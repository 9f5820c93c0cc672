"""The DAGFormer pages say what the stages' files say, and mark what was published."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from dagformer_tree import DATA, TOKENS, WINDOWS, write_comparisons
from dwr_tree import edit_csv, edit_json, edit_yaml
from report_checks import STRANGE, hashes, run_stage, strange, table_rows, unmarked
from small_settings import changed

from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dagformer import measured
from dynaroute.reporting.dagformer.page import page as dagformer_page
from dynaroute.reporting.dagformer.page import summary
from dynaroute.reporting.dagformer.results import read_analyses, read_comparisons, read_results
from dynaroute.reporting.inputs import read_record

pytestmark = pytest.mark.usefixtures("dagformer_tree")


def parts() -> tuple:
    settings = load_settings()
    results = read_results(settings)
    return results, read_comparisons(results), read_analyses(settings, results)


def page(reference: dict | None = None) -> str:
    own = reference or read_record("reports/reference.yaml")["dagformer"]
    return dagformer_page(*parts(), read_record(TOKENS / "metadata.json"), own)


def section(text: str, heading: str) -> str:
    """What follows a heading, up to the next one of any level."""
    (found,) = re.findall(rf"^#+ {re.escape(heading)}[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    return found


def only(*variants: str) -> None:
    """Leaves these variants in params.yaml, P1's the only wirings analysed, and one primary question."""

    def change(params: dict) -> None:
        params["variants"] = {name: params["variants"][name] for name in variants}
        params["analysis"]["variants"] = ["P1"]
        params["analysis"]["primary"] = {"learned": params["analysis"]["primary"]["learned"] | {"left": ["P1"]}}

    edit_yaml("params.yaml", change)
    write_comparisons()


# --- the published tables ------------------------------------------------------------------------------------------


def test_every_table_of_the_published_report_is_there_with_its_values():
    text, theirs = page(), read_record("reports/reference.yaml")["dagformer"]
    for heading, key in (("S1", "identity_init"), ("S2", "gradient_flow"), ("L0", "first_layer_gated")):
        quoted = [line.strip("> ") for line in section(text, heading).splitlines() if line.startswith(">")]
        rows = table_rows("\n".join(quoted))[2:]
        values = [[row[name] for name in row] for row in theirs[key]["rows"]]
        assert [[None if cell == "–" else float(cell.replace(",", "")) for cell in row] for row in rows] == values
    cells = {row[0].replace("*", ""): row[1:] for row in table_rows(section(text, "S0") + section(text, "S1"))}
    assert cells["NLL_base, held-out windows"] == [f"**{baseline():.4f}**", "2.4569"]
    assert cells["nll_soft"][1] == "2.4500 (-0.3%)"
    assert (cells["mean_A"][1], cells["seq_gate_frac"][1], cells["hyp_gate_frac"][1]) == ("0.975", "0.986", "0.988")
    for group in ("A1–A4: rank r", "A5–A7", "A8–A9", "A10–A11", "X1", "X2", "X3", "P1: default", "P2: extended"):
        assert table_rows(section(text, group)), group


def baseline() -> float:
    return read_record(DATA / "eval/P1/nll.json")["window"]["nll_baseline"]


def test_published_numbers_stand_nowhere_but_where_they_are_marked():
    theirs = strange(dict(read_record("reports/reference.yaml")["dagformer"]))
    results, *_ = parts()
    assert STRANGE.search(text := page(theirs))
    assert not STRANGE.search(unmarked(text))
    own = measured.section(results, measured.read_measurements(results), theirs["timing"])
    assert STRANGE.search(own)
    assert not STRANGE.search(unmarked(own))


# --- values --------------------------------------------------------------------------------------------------------


def test_a_row_of_an_ablation_is_what_the_files_say():
    rows = {row[0]: row for row in table_rows(section(page(), "A1–A4"))}
    assert list(rows)[2:] == ["A1", "A2", "P1", "A3", "A4"]
    found = read_record(DATA / "eval/A3/nll.json")["window"]
    with Path("reports/dagformer/variants.csv").open() as file:
        (line,) = [line.split(",") for line in file if line.startswith("A3,window,hard")]
    difference, low, high, reference, *against = line[4:11]
    interval = "{:+.4f} [{:+.4f}, {:+.4f}]".format
    assert rows["A3"][1:7] == [
        *("8", f"{found['nll_soft']:.4f}", f"{found['nll_hard']:.4f}"),
        interval(*map(float, (difference, low, high))),
        interval(*map(float, against)),
        f"{1 - found['density_hard']:.3f}",
    ]
    assert reference == "P1"
    assert rows["P1"][5] == "–"
    assert rows["P1"][-1] == "(reference)"


def test_the_primary_questions_stand_first_with_their_answers():
    rows = table_rows(section(page(), "Findings"))[2:]
    found = read_record(DATA / "comparisons.json")["primary"]
    assert [row[0] for row in rows] == [question["question"] for question in found]
    assert [row[-1] for row in rows] == [question["answer"] for question in found]
    assert rows[0][1] == "mean of P1, P1s1 and P1s2, minus baseline; hard, window"
    assert rows[2][1] == "mean of P1, P1s1 and P1s2, minus random; hard, window"
    assert rows[3][2].startswith("-0.01")
    assert [question["answer"] for question in found[2:4]] == ["worse", "better"]
    assert [question["headroom"] for question in found] == [0.0431] * 5 + [0.27]


def test_the_analyses_are_what_their_files_say():
    text = page()
    assert "| P1 | 0.0123 | 0.136 | 0.0024 | 0.079 | 7.7 | 24 | -0.0081 [-0.0123, -0.0039] |" in section(text, "X1")
    assert "One wiring for all texts: C1." in section(text, "X1")
    assert "| A9 | probe of soft gates | 70.0% | 49.0% | 0.012 |" in section(text, "X2")
    assert "| 0 → 1 | 15.5% | 11.0% | 0.5 | 0.600 | 0.700 |" in section(text, "X2")
    sensitivity = section(text, "X3")
    assert "| least gradient first | -0.0350 [-0.0380, -0.0320] | +0.0250 [+0.0220, +0.0280] |" in sensitivity
    assert "| layers 0 → 3 | +0.0300 [+0.0270, +0.0330] | 11 |" in sensitivity
    assert "keeps 8% of the gain" in sensitivity
    assert "J1 - J0, hard, by the prefix protocol: " in section(text, "7. Joint training")
    seeds = [row[1:4] for row in table_rows(section(text, "9. Seeds")) if row[0] == "protocol"]
    assert seeds == [[f"{name} (seed 0)", f"{name}s1 (seed 1)", f"{name}s2 (seed 2)"] for name in ("P1", "C1")]
    assert "Other variants" not in text  # all of the default ones have a section or a table of their own


def test_what_methods_found_on_the_planted_base_stands_beside_what_was_planted():
    text = section(page(), "8. The positive control")
    rows = {row[0]: row[1:] for row in table_rows(text)}
    known = "+0.2700 [+0.2658, +0.2742]"
    assert rows["mean of all masks"] == [known, known]
    gates, found = "logistic, logit {}, tau {}→0.2, lr {}".format, ["+0.1234 [+0.1192, +0.1276]", "93 % [91 %, 95 %]"]
    assert rows["planted_P1"][0] == gates(15, 5, "0.008") and rows["planted_P1"][2:5] == [*found, "–"]
    assert rows["planted_P1_open"][0] == gates(3, 1, "0.003")
    assert rows["planted_P1_open"][4:6] == ["44 % [34 %, 54 %]", "77% (50%, p = 0.012)"]
    assert float(rows["planted_P1_open"][6]) == pytest.approx(1.8, abs=0.01)
    assert "81% of the edges that a source's mask closes" in text and "probability 0.89" in text


def test_a_failed_check_names_the_variants_that_failed():
    edit_json(DATA / "eval/A3/nll.json", lambda data: data["checks"].update(dict.fromkeys(data["checks"], False)))
    text = page()
    assert "| ✗ **failed** A3 | a batch scored again gives the same bits | `evaluate_nll` (30 variants) |" in text
    assert "These checks of the stages failed: a batch scored again gives the same bits" in section(text, "Findings")
    assert summary(*parts())["failed_checks"] == 1


# --- which sentence applies ----------------------------------------------------------------------------------------


def set_s1(value: float) -> None:
    edit_json(DATA / "eval/S1/nll.json", lambda data: data["window"].update(nll_hard=value))


def stay(name: str) -> None:
    path = DATA / f"train/{name}/training.csv"
    edit_csv(path, lambda rows: rows.__setitem__(["validation_mean_A", "validation_density_hard"], 0.95))


def no_reading() -> None:
    for name in load_settings().analysis.variants:
        edit_json(
            DATA / f"analysis/{name}/topology.json",
            lambda data: data["variation"]["window"]["soft"].update(distinct=1),
        )


def set_reference(high: float) -> None:
    edit_csv("reports/dagformer/variants.csv", lambda rows: rows.__setitem__("reference_high", high))


def set_knobs(name: str, **knobs: float) -> None:
    edit_json(DATA / f"train/{name}/run.json", lambda data: data["knobs"].update(knobs))


def set_comparisons(**values) -> None:
    edit_json(DATA / "comparisons.json", lambda data: data.update(values))


def unclear() -> None:
    edit_csv(
        DATA / "sensitivity/removal.csv", lambda rows: rows.__setitem__(["low_over_random", "high_over_random"], 0)
    )


@pytest.mark.parametrize(
    ("change", "heading", "before", "after"),
    [
        (lambda: set_s1(baseline() * 1.011), "S1", "| **Result** | **PASS** |", "| **Result** | **FAIL** |"),
        (lambda: set_s1(baseline() * 1.011), "Findings", "Yes. Both modes end", "No. A mode ends more than 1% away"),
        (lambda: set_comparisons(headroom=0.03), "Findings", "(S1)", "closing every gate would pass as well"),
        (lambda: stay("S2"), "Findings", "Yes. The gates leave", "No. The gates stay at their initialisation"),
        (no_reading, "Findings", "P1 and A9 wire different texts", "No. Every variant analysed has one wiring"),
        (lambda: stay("S2flip"), "S2", "gates move too", "gates stay at their initialisation"),
        (lambda: set_reference(-0.1), "P2: extended", "P1 had converged as far", "P1 had not converged"),
        (lambda: set_knobs("P2", min_lr=0.0), "P2: extended", "a constant 0.0008", "0.0008, which falls to 0"),
        (no_reading, "X2", "linear; its balanced", "nothing to compare"),
        (unclear, "Findings", "with an interval below zero, at 10% and 50%", "At no share of edges closed is"),
    ],
)
def test_a_sentence_follows_what_was_found(change, heading, before, after):
    assert before in section(page(), heading)
    assert after not in section(page(), heading)
    change()
    assert after in section(page(), heading)


def test_l0_is_said_to_fail_only_where_its_interval_lies_above_zero():
    assert "Yes. The interval of its hard NLL minus P1's lies above zero." in section(page(), "Findings")
    assert re.search(r"planted base, where edges matter, it costs \+0\.(59|60)\d\d \[", section(page(), "Findings"))
    edit_csv("reports/dagformer/variants.csv", lambda rows: rows.__setitem__("reference_low", -0.001))
    assert "a larger failure cannot show on this base" in section(page(), "Findings")


def test_the_report_can_be_made_of_p1_alone():
    only("P1")
    text = page()
    assert "## 7. Joint" not in text and "### S1" not in text and "### A1" not in text
    assert "P1 was run with one seed" in section(text, "9. Seeds")
    assert "planted" not in text
    assert list(summary(*parts())) == [
        "nll_baseline",
        "nll_P1",
        "hard_density_P1",
        "learned_difference",
        "failed_checks",
    ]


def test_a_variant_that_a_user_added_and_p1_at_another_budget_have_rows():
    def change(params: dict) -> None:
        params["variants"] = {"P1": {"from": "base"}, "A1": {"from": "base", "rank": 2, "steps": 32}}
        params["variants"] |= {"P1s1": {"from": "base", "steps": 32}, "S2": {"from": "base", "rank": 3}}
        params["variants"]["mine"] = params["variants"].pop("S2")
        params["analysis"]["variants"] = ["P1"]
        params["analysis"]["primary"] = {"learned": params["analysis"]["primary"]["learned"] | {"left": ["P1"]}}

    edit_yaml("params.yaml", change)
    settings = load_settings()
    for name, source in (("P1", "P1"), ("A1", "A1"), ("P1s1", "P1s1"), ("mine", "S2")):
        for kind, file in (("train", "run.json"), ("train", "training.json"), ("eval", "nll.json")):
            data = read_record(DATA / kind / source / file) | {"run": name}
            if file == "run.json":
                data["knobs"] = settings.variant(name).model_dump()
            Path(DATA / kind / name).mkdir(exist_ok=True)
            (DATA / kind / name / file).write_text(json.dumps(data))
        for kind, file in (("train", "training.csv"), ("eval", "nll.csv")):
            (DATA / kind / name / file).write_bytes((DATA / kind / source / file).read_bytes())
    edit_json(DATA / "analysis/P1/topology.json", lambda data: data.update(run="P1"))
    write_comparisons()
    text = page()
    assert [row[0] for row in table_rows(section(text, "A1–A4"))[2:]] == ["A1", "P1", "P1s1"]
    (row,) = table_rows(section(text, "Other variants"))[2:]
    assert row[:2] == ["mine", "rank 3"]


# --- the pages as a whole ------------------------------------------------------------------------------------------


def test_the_pages_are_the_same_every_time_and_short():
    pages = ("reports/dagformer.md", "data/dagformer/report/measured.md", "data/dagformer/report/summary.json")
    import_module("report_dagformer").main(load_settings())
    first = hashes(*pages)
    assert run_stage("report_dagformer", PYTHONHASHSEED="7").stderr == ""
    assert hashes(*pages) == first
    text = Path(pages[0]).read_text()
    prose = re.sub(r"^[|>!#].*$", "", text, flags=re.MULTILINE)
    assert len(prose.split()) < 2500
    assert not re.search(r"\bnan\b|None|\{|\}|Undefined|\n\n\n", text)
    assert set(re.findall(r"\]\((\S*?)\)", text)) == {
        *(
            f"dagformer/{name}.png"
            for name in ("distances", "edges_closed", "gate_gradients", "nll_by_step", "variants")
        ),
        *("dagformer/wiring.png", "dagformer/variants.csv", "measured.md"),
    }


def test_times_are_those_of_the_files_and_extrapolated_from_them():
    results, *_ = parts()
    theirs = read_record("reports/reference.yaml")["dagformer"]["timing"]
    rows = table_rows(measured.section(results, measured.read_measurements(results), theirs))
    cells = {row[0]: row[1:] for row in rows}
    assert cells["all"] == ["processor A Processor 9000, threads 2"]
    assert cells["Training step"] == ["250 ms", "about 3 s"]
    assert cells["Model loading"] == ["3.5 s", "about 10 min"]
    assert cells["1K steps with evaluation (extrapolated)"] == ["6.8 min", "about 70 min"]  # a round every 16 steps
    assert cells["A1"] == ["45.0 s", "250 ms", "2.5 s", "3.5 s", "705.00 MiB"]


# --- what does not fit together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("train/A1/run.json", lambda data: data["identity"].update(base="other"), r"A1/run\.json: base is not that of"),
        ("eval/A1/nll.json", lambda data: data.update(run="other"), r"A1/nll\.json: belongs to run other"),
        (
            "analysis/P1/topology.json",
            lambda data: data.update(run="other"),
            r"P1/topology\.json: belongs to run other",
        ),
        ("sensitivity/summary.json", lambda data: data.update(base="other"), r"summary\.json: of another base than"),
        (
            "eval/A1/nll.csv",
            lambda rows: rows.__setitem__("nll_baseline", 3.0),
            r"A1/nll\.csv: its windows or baseline",
        ),
        ("train/A1/training.csv", lambda rows: rows.__setitem__("train_loss", None), "'train_loss' must hold a number"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(path, change, message):
    (edit_csv if path.endswith("csv") else edit_json)(DATA / path, change)
    with pytest.raises(DynarouteError, match=message):
        page()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("variants", {"S1": {"from": "base"}}, r"variants = \['S1'\]: must hold P1"),
        ("dagformer.seq_len", 64, r"P1/run\.json: trained with dagformer\.seq_len = 128, not 64: run dvc repro"),
        ("dagformer.train_windows", 511, r"P1/run\.json: trained with dagformer\.train_windows = 512, not 511: run"),
        ("variants", {"P1": {"from": "base"}, "S1": {"from": "base"}}, r"variants\.csv: not of the variants of params"),
    ],
)
def test_settings_that_the_results_are_not_of_are_refused(key, value, message):
    settings = load_settings()
    section, _, name = key.rpartition(".")
    with pytest.raises(DynarouteError, match=message):
        read_comparisons(read_results(changed(settings, **({section: {name: value}} if section else {name: value}))))


def test_all_windows_may_be_called_null_or_by_their_number():
    settings = load_settings()
    found = [read_results(one) for one in (settings, changed(settings, dagformer={"train_windows": None}))]
    assert found[0].variants.keys() == found[1].variants.keys()


@pytest.mark.parametrize("name", ["compare_variants", "plot_dagformer", "report_dagformer"])
def test_a_missing_file_is_named_in_one_line(name):
    Path(DATA / "eval/A2/nll.json").unlink()
    with pytest.raises(DynarouteError, match=r"^data/dagformer/eval/A2/nll\.json: cannot be read: [^\n]*$"):
        import_module(name).main(load_settings())


def test_comparing_writes_the_same_bytes_every_time_of_all_windows():
    files = ("data/dagformer/comparisons.json", "reports/dagformer/variants.csv", "reports/dagformer/P1.csv")
    import_module("compare_variants").main(load_settings())
    found = hashes(*files)
    assert run_stage("compare_variants", PYTHONHASHSEED="7").stderr == ""
    assert hashes(*files) == found
    assert read_record(files[0])["primary"][0]["documents"] == WINDOWS // 2
    assert Path(files[2]).read_bytes() == (DATA / "train/P1/training.csv").read_bytes()
