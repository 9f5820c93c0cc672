"""The DAGFormer pages say what the stages' files say, and mark what was published."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from compare_variants import GATES
from dagformer_tree import DATA, TOKENS, WINDOWS, write_comparisons
from dwr_tree import edit_json, edit_yaml
from report_checks import STRANGE, assert_readable, hashes, run_stage, strange, table_rows, unmarked
from small_settings import changed

from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.reporting.dagformer import measured
from dynaroute.reporting.dagformer.page import best_blind, summary, values
from dynaroute.reporting.dagformer.results import read_analyses, read_comparisons, read_results
from dynaroute.reporting.inputs import read_benchmark, read_record
from dynaroute.reporting.pages import render

pytestmark = pytest.mark.usefixtures("dagformer_tree")


def parts() -> tuple:
    settings = load_settings()
    results = read_results(settings)
    return results, read_comparisons(), read_analyses(settings)


def page(reference: dict | None = None) -> str:
    own = reference or read_record("reports/reference.yaml")["dagformer"]
    found = values(*parts(), read_record(TOKENS / "metadata.json"), own, read_benchmark("stability"))
    return render("dagformer.md", found)


def section(text: str, heading: str) -> str:
    """What follows the heading that holds a text, up to the next one."""
    (found,) = re.findall(rf"^#+ [^\n]*{re.escape(heading)}[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
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
    for heading, key in (("S0, S1", "identity_init"), ("(S2)", "gradient_flow"), ("(L0)", "first_layer_gated")):
        rows = [row for row in theirs[key]["rows"]]
        head, _, *lines = re.findall(r"^> (\|.*)$", section(text, heading), re.MULTILINE)
        found = [dict(zip(cells(head), cells(line), strict=True)) for line in lines]
        shown = [{key: None if cell == "–" else number(cell) for key, cell in row.items()} for row in found]
        assert shown == [dict(row) for row in rows]
    rows = {row[0].replace("*", ""): row[1:] for row in table_rows(section(text, "S0, S1"))}
    assert rows["NLL_base, held-out windows"] == [f"**{baseline():.4f}**", "2.4569"]
    assert rows["nll_soft"][1] == "2.4500 (-0.3%)"
    assert (rows["mean_A"][1], rows["seq_gate_frac"][1], rows["hyp_gate_frac"][1]) == ("0.975", "0.986", "0.988")
    ids = [row[0] for row in table_rows(section(text, "5. P1, P2")) if re.fullmatch(r"[PA]\d+", row[0])]
    assert ids == ["P1", "P2", *(f"A{index}" for index in range(1, 12))]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def baseline() -> float:
    return read_record(DATA / "eval/P1/nll.json")["window"]["nll_baseline"]


def test_published_numbers_stand_nowhere_but_where_they_are_marked():
    theirs = strange(dict(read_record("reports/reference.yaml")["dagformer"]))
    results, *_ = parts()
    assert STRANGE.search(text := page(theirs))
    assert not STRANGE.search(unmarked(text))
    own = measured.section(results, theirs["timing"])
    assert STRANGE.search(own)
    assert not STRANGE.search(unmarked(own))


# --- values --------------------------------------------------------------------------------------------------------


def test_a_row_of_an_ablation_is_what_the_files_say():
    rows = {row[0]: row for row in table_rows(section(page(), "5. P1, P2"))}
    found = read_record(DATA / "eval/A3/nll.json")["window"]
    with Path("reports/dagformer/variants.csv").open() as file:
        (line,) = [line.split(",") for line in file if line.startswith("A3,window,hard")]
    difference, low, high, reference, *against = line[4:11]
    interval = "{:+.4f} [{:+.4f}, {:+.4f}]".format
    assert rows["A3"][1:6] == [
        *("rank 8", f"{found['nll_soft']:.4f}", f"{found['nll_hard']:.4f}"),
        interval(*map(float, (difference, low, high))),
        interval(*map(float, against)),
    ]
    assert rows["A3"][6] == f"{found['density_hard']:.3f}"
    assert [float(value) for value in line[-6:]] == [found[key] for key in GATES]
    assert reference == "P1"
    assert rows["P1"][5] == rows["J0"][5] == "–"
    assert rows["A4"][1] == "rank 32 (full rank)"
    assert rows["S2"][4] == rows["J1"][5] == "section 1"  # a primary question shows them


def test_the_primary_questions_stand_first_with_their_answers():
    rows = table_rows(section(page(), "1. The primary"))[2:]
    found = read_record(DATA / "comparisons.json")["primary"]
    assert [row[0] for row in rows] == [question["question"] for question in found]
    words = {"better": "yes", "worse": "no, it is worse"}
    assert [row[1] for row in rows] == [words.get(question["answer"], question["answer"]) for question in found]
    assert (rows[0][2], rows[2][2]) == ("P1, P1s1, P1s2 − baseline", "P1, P1s1, P1s2 − random")
    assert rows[3][4].startswith("-0.01")
    assert [question["answer"] for question in found[2:4]] == ["worse", "better"]
    assert [question["headroom"] for question in found] == [0.0431] * 5 + [0.27]


def test_no_other_number_is_called_better_or_worse():
    start, end = page().split("## 2.")[0], page().split("## 2.")[1]
    assert "worse" in start
    assert not re.search(r"\b(better|worse|significant\w*)\b(?! than random)", end)


def test_the_analyses_are_what_their_files_say():
    text = page()
    assert "| P1 | 24 | 0.136 | 0.079 | -0.0081 [-0.0123, -0.0039] |" in section(text, "X1, X2")
    assert "| A9 | 0.016 (p = 0.012) | 70% (p = 0.012) | 97% (p = 0.012) |" in section(text, "X1, X2")
    sensitivity = section(text, "(X3)")
    assert "| least gradient first | -0.0350 [-0.0380, -0.0320] | +0.0250 [+0.0220, +0.0280] |" in sensitivity
    assert "| expected gain first − random | +0.0800 [+0.0770, +0.0830] |" in sensitivity
    assert "for 33 steps, which closes 37% of the edges" in sensitivity
    assert "| the text that follows it | -0.0220 [-0.0262, -0.0178] |" in sensitivity
    assert "By the prefix protocol, J1 − J0 is " in section(text, "(J1)")
    spread = read_record(DATA / "comparisons.json")["seeds"]["window"]["hard"]["spread"]
    assert f"a standard deviation of {spread:.4f}" in section(text, "5. P1, P2")
    assert not {"P1s1", "S1", "planted_P1"} & {row[0] for row in table_rows(section(text, "5. P1, P2"))}


def test_what_methods_found_on_the_planted_base_stands_beside_what_was_planted():
    text = section(page(), "10. ")
    rows = {row[0]: row[1:] for row in table_rows(text)}
    known = "+0.2700 [+0.2658, +0.2742]"
    assert rows["the mean of all masks"] == [known, known]
    found = ["+0.123 [+0.119, +0.128]", "93 % [91 %, 95 %]", "–"]
    assert rows["planted_P1: logit 15, tau 5→0.2"][:3] == found
    best = rows["planted_P1_open: logit 3, tau 1→0.2"]
    assert best[2:5] == ["44 % [34 %, 54 %]", "77%", "61%"]
    assert float(best[5]) == pytest.approx(1.8, abs=0.01)
    assert "81% of the edges that a source's mask closes" in text


def test_a_failed_check_names_the_variants_that_failed():
    edit_json(DATA / "eval/A3/nll.json", lambda data: data["checks"].update(dict.fromkeys(data["checks"], False)))
    text = section(page(), "11. ")
    assert "checks that the stages made failed:** a batch scored again gives the same bits (evaluation of A3)." in text
    assert summary(*parts())["failed_checks"] == 1


# --- which sentence applies ----------------------------------------------------------------------------------------


def set_s1(value: float) -> None:
    edit_json(DATA / "eval/S1/nll.json", lambda data: data["window"].update(nll_hard=value))


def repeated(changed: list[str]) -> None:
    write_json("reports/benchmarks/stability.json", {"runs": [{}] * 4, "changed": changed})


def one_source() -> None:
    edit_json(DATA / "analysis/P1/topology.json", lambda data: data.update(domains=None))


@pytest.mark.parametrize(
    ("change", "heading", "before", "after"),
    [
        (lambda: set_s1(baseline() * 1.011), "S0, S1", "**S1 passes**", "**S1 fails**"),
        (lambda: repeated([]), "1. The", "It was not run", "No answer changed over 4 repetitions"),
        (lambda: repeated(["flow"]), "1. The", "It was not run", "are therefore no conclusions: flow."),
        (one_source, "X1, X2", "by a linear probe", "X2 compares nothing here"),
    ],
)
def test_a_sentence_follows_what_was_found(change, heading, before, after):
    assert before in section(page(), heading)
    assert after not in section(page(), heading)
    change()
    assert after in section(page(), heading)


def test_the_best_wiring_that_reads_no_text_is_a_control_of_the_planted_base():
    results, _, analyses = parts()
    known = analyses.planted["prefix"]["minus_own"]
    blind = [known[key]["mean"] for key in ("mean", "one", "zero")]
    blind += [analyses.methods[name]["prefix"]["above_own"]["mean"] for name in ("planted_C1", "planted_C1_open")]
    best = min(methods["prefix"]["above_own"]["mean"] for methods in analyses.methods.values())
    found = best_blind(results, analyses)
    assert found["above"] == min(blind)
    assert found["closed"] == pytest.approx(1 - best / min(blind))


def test_the_report_can_be_made_of_p1_alone():
    only("P1")
    text = page()
    assert not re.search(r"\*\*S1|\(S2\)|\(L0\)|\(J1\)|standard deviation|planted_", text)
    assert [row[0] for row in table_rows(section(text, "5. P1, P2"))] == ["ID", ":---", "P1"]
    assert list(summary(*parts())) == [
        "nll_baseline",
        "nll_P1",
        "hard_density_P1",
        "P1_minus_baseline",
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
    rows = {row[0]: row for row in table_rows(section(page(), "5. P1, P2"))}
    assert [name for name in rows if not name.startswith((":", "-"))] == ["ID", "P1", "A1", "P1s1", "mine"]
    assert rows["mine"][1] == "rank 3" and rows["mine"][5].startswith(("+", "-"))


# --- the pages as a whole ------------------------------------------------------------------------------------------


def test_the_pages_are_the_same_every_time_and_short():
    pages = (
        "reports/dagformer.md",
        *(f"data/dagformer/report/{name}" for name in ("measured.md", "summary.md", "summary.json")),
    )
    import_module("report_dagformer").main(load_settings())
    first = hashes(*pages)
    assert run_stage("report_dagformer", PYTHONHASHSEED="7").stderr == ""
    assert hashes(*pages) == first
    text = Path(pages[0]).read_text()
    assert_readable(text, words=2500)
    assert set(re.findall(r"\]\((\S*?)\)", text)) == {
        *(f"dagformer/{name}.png" for name in ("edges_closed", "planted", "topology")),
        *("dagformer/variants.csv", "measured.md"),
    }


def test_times_are_those_of_the_files_and_extrapolated_from_them():
    results, *_ = parts()
    theirs = read_record("reports/reference.yaml")["dagformer"]["timing"]
    text = measured.section(results, theirs)
    assert "Over all 24 variants a step takes 250 ms in the median" in text
    cells = {row[0]: row[1:] for row in table_rows(text)}
    assert cells["Training step"] == ["250 ms", "about 3 s"]
    assert cells["Model loading"] == ["3.5 s", "about 10 min"]
    assert cells["1K steps with evaluation (extrapolated)"] == ["6.8 min", "about 70 min"]  # a round every 16 steps


# --- what is missing -----------------------------------------------------------------------------------------------


def test_settings_without_the_main_variant_are_refused():
    with pytest.raises(DynarouteError, match=r"variants = \['S1'\]: must hold P1"):
        read_results(changed(load_settings(), variants={"S1": {"from": "base"}}))


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
