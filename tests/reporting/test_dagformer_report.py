"""The DAGFormer report says what its inputs say: whatever number changes there, changes here."""

import re
from pathlib import Path

import pandas as pd
import pytest
from dagformer_tree import BASELINE, write_comparisons, write_variant
from dwr_tree import edit_csv, edit_json, edit_yaml
from report_checks import STRANGE, strange, table_rows, unmarked

from dynaroute.analysis.statistics import paired_difference
from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dagformer.analyses import read_analyses
from dynaroute.reporting.dagformer.report import page
from dynaroute.reporting.dagformer.results import read_results

pytestmark = pytest.mark.usefixtures("dagformer_tree")

REPORTS = Path("reports/dagformer")
BASE = REPORTS / "base.json"
PARAMS = Path("params.yaml")


def report() -> str:
    settings = load_settings()
    results = read_results(settings)
    return page(results, read_analyses(settings, results))


def section(text: str, title: str) -> str:
    return re.split(r"^##+ ", text.split(f"# {title}", 1)[1], flags=re.MULTILINE)[0]


def row_of(text: str, first: str) -> list[str]:
    return next(row for row in table_rows(text) if row[0] == first)


def shift(name: str, mode: str, by: float, spread: float = 0.001) -> None:
    """Moves a variant's NLL on every window to about `by` from the baseline, in both files of the evaluation."""
    path = REPORTS / name / "nll.csv"

    def change(rows: pd.DataFrame) -> None:
        noise = pd.Series([(-1) ** (index // 2) * spread for index in range(len(rows))])
        rows[f"nll_{mode}"] = rows["nll_baseline"] + by + noise

    edit_csv(path, change)
    rows = pd.read_csv(path)

    def summarise(data: dict) -> None:
        for protocol in ("window", "prefix"):
            own = rows[rows["protocol"] == protocol]
            found = paired_difference(own[f"nll_{mode}"], own["nll_baseline"])
            data[protocol][f"nll_{mode}"] = own[f"nll_{mode}"].mean()
            data[protocol][f"{mode}_minus_baseline"].update(found._asdict())

    edit_json(REPORTS / name / "nll.json", summarise)


def decide(family: str, verdicts: dict[str, str], mode: str, protocol: str = "window") -> None:
    """Sets what the corrected test of each variant's difference in a family shows."""

    def change(rows: pd.DataFrame) -> None:
        own = (rows["family"] == family) & (rows["mode"] == mode) & (rows["protocol"] == protocol)
        for name, verdict in verdicts.items():
            rows.loc[own & (rows["ours"] == name), "verdict"] = verdict

    edit_csv("reports/statistics/comparisons.csv", change)


def keep(names: list[str]) -> None:
    """Reduces the settings, and what was found of all variants together, to some variants."""

    def change(params: dict) -> None:
        params["variants"] = {name: params["variants"][name] for name in names}
        params["analysis"]["variants"] = [name for name in params["analysis"]["variants"] if name in names] or names[:1]

    edit_yaml(PARAMS, change)
    write_comparisons(Path(), load_settings())


def drop(*names: str) -> None:
    keep([name for name in load_settings().variants if name not in names])


def test_the_same_inputs_give_the_same_bytes():
    assert report() == report()


def test_it_has_the_sections_of_the_published_report():
    titles = re.findall(r"^###? (.*)$", report(), flags=re.MULTILINE)
    assert [re.split(r"[:.]", title)[0] for title in titles] == [
        *("At a glance", "1", "Variants", "2", "S0", "S1", "S2", "3", "P1", "P2", "4"),
        *("A1–A4", "A5–A7", "A8–A9", "A10–A11", "L0", "C1", "5", "What reading the answer is worth"),
        *("6", "X1", "X2", "X3", "7", "8", "Seeds", "9", "10"),
    ]


def test_it_holds_no_placeholder():
    assert not re.search(r"\bnan\b|None\b|\{|\}|<class|\bTrue\b|\bFalse\b|-0\.0000", report())


def test_figures_are_linked_relative_to_the_report_and_are_those_that_the_plot_stage_writes():
    links = set(re.findall(r"!\[.*\]\(figures/dagformer_(\w+)\.png\)", report()))
    names = {"adjacency", "density_by_layer_pair", "nll_by_step", "schedules", "gate_gradients", "variants"}
    names |= {"topology_variance", "domains", "sensitivity", "removal"}
    assert links == names


# --- every number comes from the inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("nll_all_gates_one", "2.3456"),
        ("nll_all_gates_zero", "7.6543"),
        ("unigram_entropy", "6.5432"),
    ],
)
def test_the_base_is_that_of_its_file(key, shown):
    edit_json(BASE, lambda data: data.__setitem__(key, float(shown)))
    assert shown in section(report(), "S0")


@pytest.mark.parametrize(
    ("low", "high", "words", "verdict"),
    [
        (0.8, 1.2, "matter", "worse"),
        (-0.1, 2.1, "are not shown to matter", "no difference shown"),
        (-1.2, -0.8, "do harm", "better"),
    ],
)
def test_the_rise_without_any_connection(low, high, words, verdict):
    mean = (low + high) / 2

    def change(data):
        data.update(nll_all_gates_one=4.0, nll_all_gates_zero=4.0 + mean)
        data["zero_minus_one"].update(mean=mean, low=low, high=high)

    edit_json(BASE, change)
    text = report()
    sentence = (
        f"{words} to this base: without any, NLL of validation windows is {4 + mean:.4f} in place of 4.0000 "
        f"({mean / 4:+.1%}; {mean:+.4f} [{low:+.4f}, {high:+.4f}], n = 32: {verdict})."
    )
    assert sentence in section(text, "S0")
    assert sentence in section(text, "At a glance")


@pytest.mark.parametrize("protocol", ["window", "prefix"])
@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("name", ["S1", "P1", "A4", "C1"])
def test_every_variant_is_in_the_table_of_each_protocol_with_its_interval(name, mode, protocol):
    def change(data):
        data[protocol][f"nll_{mode}"] = 1.2345
        data[protocol][f"{mode}_minus_baseline"].update(mean=0.5432, low=0.4321, high=0.6543)

    edit_json(REPORTS / name / "nll.json", change)
    text = section(report(), "5. Both protocols").split(f"**{protocol.title()} protocol**\n", 1)[1]
    cells = row_of(text, name)
    assert "1.2345" in cells
    assert "+0.5432 [+0.4321, +0.6543] worse" in cells


@pytest.mark.parametrize(
    ("group", "name", "key", "value", "shown"),
    [
        ("A1–A4", "A3", "density_hard", 0.123, "0.877"),
        ("A5–A7", "A6", "entropy_bits", 0.4321, "0.432"),
        ("A8–A9", "A9", "density_hard", 0.123, "0.123"),
        ("A10–A11", "A11", "dead_heads", 77, "77"),
        ("A10–A11", "P1", "dead_heads", 78, "78"),
    ],
)
def test_each_ablation_has_its_measure(group, name, key, value, shown):
    edit_json(REPORTS / name / "nll.json", lambda data: data["window"].__setitem__(key, value))
    assert shown in row_of(section(report(), group), name)


def test_ablation_tables_have_the_published_order_and_p1_as_reference():
    text = report()
    groups = {"A1–A4": "A1 A2 P1 A3 A4", "A5–A7": "A5 P1 A6 A7", "A8–A9": "A8 P1 A9", "A10–A11": "A10 P1 A11"}
    for title, names in groups.items():
        rows = table_rows(section(text, title))
        assert [row[0] for row in rows[2:]] == names.split()
        assert [row[-1] for row in rows if row[0] == "P1"] == ["(reference)"]
    assert [row[1] for row in table_rows(section(text, "A1–A4"))[2:]] == ["2", "4", "8", "16", "64"]
    assert row_of(section(text, "A5–A7"), "A6")[1:3] == ["5", "0.05"]
    assert row_of(section(text, "A8–A9"), "A9")[1] == "0→0.05"
    assert [row_of(section(text, "A10–A11"), name)[1] for name in ("A10", "P1", "A11")] == [
        *("off", "k=5 fixed", "k=5 learnable")
    ]


def test_differences_to_the_reference_are_paired_over_windows():
    ours, theirs = (pd.read_csv(REPORTS / name / "nll.csv") for name in ("A2", "P1"))
    own = ours["protocol"] == "window"
    found = paired_difference(ours[own]["nll_hard"], theirs[own]["nll_hard"])
    cell = row_of(section(report(), "A1–A4"), "A2")[6]
    assert cell.startswith(f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")


@pytest.mark.parametrize(
    "column", ["validation_nll_soft", "validation_nll_hard", "validation_mean_A", "train_loss", "step"]
)
@pytest.mark.parametrize(("name", "title"), [("S1", "S1"), ("S2", "S2"), ("P1", "P1"), ("P2", "P2"), ("L0", "L0")])
def test_per_step_tables_are_those_of_the_file(name, title, column):
    before = section(report(), title)
    edit_csv(REPORTS / name / "training.csv", lambda curve: curve.__setitem__(column, curve[column] * 2))
    assert section(report(), title) != before


def test_what_was_published_of_s1_and_s2_beside_their_tables_is_quoted():
    text = report()
    quoted = " ".join(line for line in section(text, "S1").splitlines() if line.startswith(">"))
    assert "about 2 h on A40 x 1" in quoted
    assert "At step 700 a transient dip: nll_soft 2.496, mean_A 0.916." in quoted
    quoted = " ".join(line for line in section(text, "S2").splitlines() if line.startswith(">"))
    assert "Train NLL of single batches: 0.27 to 2.96" in quoted


def test_the_gradient_check_shows_gradient_and_slope_by_step():
    def change(curve):
        trained = curve["step"] > 0  # none at step 0
        curve["train_gate_gradient"], curve["train_gate_slope"] = trained * 1e-3 / trained, trained * 1e-5 / trained

    edit_csv(REPORTS / "S2/training.csv", change)
    row = row_of(section(report(), "S2"), f"{load_settings().variant('S2').validate_every}")
    assert row[6:8] == ["1.00e-03", "1.00e-05"]
    assert row_of(section(report(), "S2"), "0")[6:8] == ["–", "–"]


def test_a_long_curve_is_thinned_and_says_so():
    path = REPORTS / "P1/training.csv"
    curve = pd.read_csv(path)
    long = pd.concat([curve.iloc[[0]], *[curve.iloc[[1]]] * 99, curve.iloc[[-1]]], ignore_index=True)
    long["step"] = range(0, 1010, 10)
    long.to_csv(path, index=False)
    text = section(report(), "P1")
    steps = [row[0] for row in table_rows(text.split("By step", 1)[1])[2:]]
    assert len(steps) <= 14
    assert {"0", "1,000"} <= set(steps)
    assert f"{101 - len(steps)} of 101 validations are left out" in text


def test_settings_are_those_of_the_runs_and_not_of_params_yaml():
    edit_json("data/dagformer/A1/run.json", lambda data: data["knobs"].__setitem__("rank", 54321))
    assert row_of(section(report(), "A1–A4"), "A1")[1] == "54321"
    assert "rank 54,321" in row_of(section(report(), "Variants"), "A1")


# --- rules have an answer for each outcome ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "by", "outcome"),
    [
        *(("soft", 0.0099 * BASELINE, "PASS"), ("soft", 0.0101 * BASELINE, "FAIL")),
        *(("hard", -0.0099 * BASELINE, "PASS"), ("hard", -0.0101 * BASELINE, "FAIL")),
    ],
)
def test_s1_passes_within_one_percent_of_the_baseline(mode, by, outcome):
    edit_json(REPORTS / "S1/nll.json", lambda data: data["window"].update(nll_baseline=BASELINE, nll_soft=BASELINE))
    edit_json(REPORTS / "S1/nll.json", lambda data: data["window"].update(nll_hard=BASELINE))
    edit_json(REPORTS / "S1/nll.json", lambda data: data["window"].__setitem__(f"nll_{mode}", BASELINE + by))
    text = report()
    assert row_of(section(text, "S1"), "**Result**")[1] == f"**{outcome}**"
    assert f"- S1 {outcome}: final NLL is" in section(text, "At a glance")


def test_s2_is_met_only_if_the_corrected_test_shows_it_whatever_its_interval():
    for mode in ("soft", "hard"):
        shift("S2", mode, -0.01)
    decide("baseline", {"S2": "better"}, "soft")
    decide("baseline", {"S2": "no difference shown"}, "hard")
    assert "NLL below the baseline: met in soft mode." in section(report(), "S2")
    decide("baseline", {"S2": "no difference shown"}, "soft")
    text = report()
    assert row_of(section(text, "S2"), "**Result**")[1] == "**not shown**"
    assert "- S2: NLL below the baseline: not shown to be met." in section(text, "At a glance")


def test_gates_that_stay_where_they_began_are_said_to():
    assert "The gates left their initialisation" in section(report(), "S2")

    def still(curve):
        curve["validation_mean_A"], curve["validation_density_hard"] = 0.953, 1.0

    edit_csv(REPORTS / "S2/training.csv", still)
    assert "The gates stayed at their initialisation: mean_A went from 0.953 to 0.953" in section(report(), "S2")


def test_a_saturated_training_is_named_everywhere():
    assert "none of 21 variants saturated or collapsed" in report()
    change = {"verdict": "saturated", "verdict_reason": "the slope was below 1e-07 from step 3 to 99"}
    for name in ("A6", "A7"):
        edit_json(REPORTS / name / "training.json", lambda data: data.update(change))
    text = report()
    assert "Alarms in training: saturated: A6, A7." in section(text, "At a glance")
    assert row_of(section(text, "Variants"), "A6")[-1] == "**saturated**"
    assert "- A6, A7: saturated, since the slope was below 1e-07 from step 3 to 99." in section(text, "Variants")
    assert row_of(section(text, "A5–A7"), "A6")[-1] == "**saturated**"


@pytest.mark.parametrize("protocol", ["window", "prefix"])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_variants_are_sorted_by_what_the_corrected_test_shows(mode, protocol):
    keep(["S1", "S2", "P1", "A1", "C1"])
    start = f"- 5 variants against the baseline in {mode} mode ({protocol} protocol): "
    better, worse, none = "better", "worse", "no difference shown"
    decide("baseline", {"S1": none, "S2": better, "P1": worse, "A1": better, "C1": worse}, mode, protocol)
    lines = section(report(), "At a glance").splitlines()
    assert f"{start}better: S2, A1; worse: P1, C1; no difference shown: S1." in lines
    decide("baseline", {"S2": worse, "A1": worse}, mode, protocol)
    lines = section(report(), "At a glance").splitlines()
    assert f"{start}better: none; worse: S2, P1, A1, C1; no difference shown: S1." in lines


def test_ablations_are_sorted_by_what_the_corrected_test_shows():
    decide("reference", {"A1": "better", "A2": "no difference shown", "A3": "worse", "A4": "worse"}, "hard")
    text = report()
    assert "hard NLL: better: A1; worse: A3, A4; no difference shown: A2." in section(text, "A1–A4")
    assert "Ablations against P1 in hard mode (window protocol): better: A1; worse: A3, A4" in text


def test_going_on_from_p1_may_improve_it_or_not():
    soft, hard = (
        f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}], n = {found.n}"
        for found in (paired_difference(window_nll("P2", mode), window_nll("P1", mode)) for mode in ("soft", "hard"))
    )
    soft, hard = (re.sub(r"-0\.0000", "+0.0000", words) for words in (soft, hard))
    for mode in ("soft", "hard"):
        decide("reference", {"P2": "worse"}, mode)
    text = report()
    for title in ("P2", "At a glance"):
        assert f": worse in soft and hard mode: {soft}, {hard}." in section(text, title)
    decide("reference", {"P2": "better"}, "hard")
    assert f": worse in soft mode: {soft}; better in hard mode: {hard}." in section(report(), "P2")
    for mode in ("soft", "hard"):
        decide("reference", {"P2": "no difference shown"}, mode)
    assert f": no difference shown in soft and hard mode: {soft}, {hard}." in section(report(), "P2")


def window_nll(name: str, mode: str) -> pd.Series:
    rows = pd.read_csv(REPORTS / name / "nll.csv")
    return rows.loc[rows["protocol"] == "window", f"nll_{mode}"]


@pytest.mark.parametrize(
    ("warm_up", "words"), [(0, "it begins at 0.0321, without warm-up"), (7, "it rises to 0.0321 over 7 steps")]
)
def test_the_learning_rate_that_p2_starts_anew_with_is_that_of_its_knobs(warm_up, words):
    edit_json("data/dagformer/P2/run.json", lambda data: data["knobs"].update(lr=0.0321, warmup_steps=warm_up))
    for name in ("P1", "P1s1", "P1s2"):  # the others are P1 with other seeds
        edit_json(f"data/dagformer/{name}/run.json", lambda data: data["knobs"].update(min_lr=0.0012))
    assert f"starts anew at its full rate: {words}, where P1's was to end at 0.0012." in section(report(), "P2")


@pytest.mark.parametrize(
    ("by", "verdict", "words"),
    [
        (1.5, "worse", "Without the exemption hard NLL is worse: +1."),
        (-0.5, "better", "Without the exemption hard NLL is better: -0."),
        (0.5, "no difference shown", "No difference in hard NLL was shown here: +0."),
    ],
)
def test_the_layer_0_ablation(by, verdict, words):
    shift("P1", "hard", 0.0345)
    shift("L0", "hard", by, spread=0.002)
    decide("reference", {"L0": verdict}, "hard")
    text = report()
    assert words in section(text, "L0")
    assert words in section(text, "At a glance")
    assert [row[0] for row in table_rows(section(text, "L0"))[2:4]] == ["P1", "L0"]


def test_what_the_text_adds_to_one_topology():
    for protocol in ("window", "prefix"):
        decide("control", {"P1": "better"}, "soft", protocol)
        decide("control", {"P1": "worse"}, "hard", protocol)
    text = section(report(), "C1")
    assert "P1 - C1: better: soft (window), soft (prefix); worse: hard (window), hard (prefix). C1 was run with" in text


def test_a_failed_check_is_shown_with_its_variants():
    name = "base_is_unchanged_to_the_bit"
    assert "68 of 68 checks" in report()
    edit_json(REPORTS / "A3/training.json", lambda data: data["checks"].__setitem__(name, False))
    text = report()
    assert ["✗ **failed** A3", "base is unchanged to the bit", "`train_dagformer` (of 21)"] in table_rows(text)
    assert "67 of 68 checks" in text
    edit_json(BASE, lambda data: data.__setitem__("checks", {"odd_check": "yes"}))
    assert ["✗ **failed**", "odd check", "`prepare_base`"] in table_rows(report())


# --- the variants are those of params.yaml ------------------------------------------------------------------------


def add_variant(name: str, overrides: dict) -> None:
    edit_yaml(PARAMS, lambda params: params["variants"].__setitem__(name, {"from": "base", **overrides}))
    write_variant(Path(), load_settings(), name, 40)


def test_an_added_variant_gets_a_row_of_its_own():
    assert "Other variants" not in report()
    add_variant("A12", {"init_logit": 4.0})
    text = report()
    assert row_of(section(text, "Other variants"), "A12")[1] == "init_logit 4"
    assert "22 variants" in text
    assert [row[0] for row in table_rows(section(text, "Variants"))][-1] == "A12"


def test_p1_at_the_budget_of_the_ablations_is_their_reference():
    add_variant("P1s", {"steps": 100})
    for name in ("A8", "A9"):
        edit_yaml(PARAMS, lambda params, name=name: params["variants"][name].__setitem__("steps", 100))
        write_variant(Path(), load_settings(), name, 20)
    write_comparisons(Path(), load_settings())
    text = report()
    rows = table_rows(section(text, "A8–A9"))
    assert [(row[0], row[-1]) for row in rows[2:]] == [
        *(("A8", "100 steps"), ("P1", "(reference)"), ("P1s", "(reference), 100 steps"), ("A9", "100 steps"))
    ]
    assert "Against P1s on the same windows" in section(text, "A8–A9")
    assert [row[0] for row in table_rows(section(text, "A1–A4"))[2:]] == ["A1", "A2", "P1", "A3", "A4"]
    assert "Other variants" not in text


def test_ablations_without_p1_at_their_budget_are_compared_with_nothing():
    for name in ("A8", "A9"):
        edit_yaml(PARAMS, lambda params, name=name: params["variants"][name].__setitem__("steps", 100))
        write_variant(Path(), load_settings(), name, 20)
    text = section(report(), "A8–A9")
    assert "P1 was not run at this budget" in text
    assert row_of(text, "A9")[6] == "–"


def test_variants_that_are_not_listed_are_left_out():
    drop("S1", "S2", "P2", "A2", "A5", "A6", "A7", "L0", "C1", "J0")
    text = report()
    titles = re.findall(r"^### (\w+)", text, flags=re.MULTILINE)
    assert titles == ["Variants", "S0", "P1", "A1", "A8", "A10", "What", "X1", "X2", "X3", "Seeds"]
    assert [row[0] for row in table_rows(section(text, "A1–A4"))[2:]] == ["A1", "P1", "A3", "A4"]


def test_p1_alone_makes_a_report():
    keep(["P1"])
    text = report()
    assert "No ablation was run at a budget of P1's." in text
    assert not re.search(r"\b0 of (?!4 comparisons)", text)  # none of the four is too close to say


def test_without_p1_there_is_nothing_to_compare_with():
    drop("P1", "P2")
    assert refusal() == "variants: the report compares with P1, which params.yaml does not list"


# --- what is published is marked ----------------------------------------------------------------------------------


def test_no_published_number_is_unmarked():
    """Every number of the reference becomes one that nothing else can be, and is then looked for outside the marks."""

    before = report()
    edit_yaml("reports/reference.yaml", lambda data: data.__setitem__("dagformer", strange(data["dagformer"])))
    text = report()
    assert len(STRANGE.findall(text)) > 80  # they are all there
    assert unmarked(text) == unmarked(before)


def test_published_numbers_keep_their_digits():
    assert "> | 2,000 | 2.4500 | 2.4506 | 2.4569 | 0.978 |" in report()


# --- inputs that are missing, damaged or of another run -----------------------------------------------------------

INPUTS = [
    *(BASE, Path("reports/reference.yaml"), Path("data/tokens/docs/metadata.json"), Path("data/dagformer/A2/run.json")),
    *(REPORTS / "A2" / name for name in ("training.csv", "training.json", "nll.csv", "nll.json")),
]


def refusal() -> str:
    with pytest.raises(DynarouteError) as caught:
        report()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", INPUTS, ids=str)
@pytest.mark.parametrize("content", [None, b"", b"[", b"a: [1"])
def test_a_missing_or_damaged_input_is_named(path, content):
    path.unlink() if content is None else path.write_bytes(content)
    assert refusal().startswith(str(path))


@pytest.mark.parametrize("name", ["training.json", "nll.json"])
def test_results_of_another_run_are_refused(name):
    path = REPORTS / "A2" / name
    edit_json(path, lambda data: data.__setitem__("run", "fedcba"))
    assert refusal() == f"{path}: belongs to run fedcba, not a20123456789abcd: run dvc repro"


def test_a_baseline_that_is_not_the_same_number_for_every_variant_is_an_error():
    path = REPORTS / "A2/nll.csv"

    def change(rows):
        rows.loc[3, "nll_baseline"] += 1e-9

    edit_csv(path, change)
    assert refusal().startswith(f"{path}: its baseline NLL or windows differ from those of {REPORTS / 'S1/nll.csv'}")


@pytest.mark.parametrize("key", ["base", "dagformer"])
def test_variants_of_different_bases_or_texts_are_not_compared(key):
    path = Path("data/dagformer/A2/run.json")
    edit_json(path, lambda data: data["identity"].__setitem__(key, "other"))
    assert refusal() == f"{path}: {key} is not that of data/dagformer/S1/run.json: run dvc repro"


def test_a_missing_key_names_its_file():
    path = REPORTS / "A2/nll.json"
    edit_json(path, lambda data: data["prefix"].pop("dead_heads"))
    assert "dead_heads" not in report()  # of the prefix protocol it is only shown for the variants with a section
    edit_json(path, lambda data: data["window"].pop("dead_heads"))
    assert refusal().startswith(f"{path}: lacks 'dead_heads'")


@pytest.mark.parametrize("column", ["validation_tau", "train_gate_slope"])
def test_a_missing_column_names_its_file(column):
    path = REPORTS / "A2/training.csv"
    edit_csv(path, lambda curve: curve.drop(columns=column))
    assert refusal().startswith(f"{path}: ")
