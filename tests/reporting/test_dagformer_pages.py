"""The DAGFormer pages and figures say what the stages' files say, and mark what was published."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from compare_variants import GATES
from report_checks import STRANGE, edit_json, edit_yaml, strange, table_rows, unmarked
from repository import REPOSITORY, stage_script
from small_settings import changed

from dynaroute.config import load_settings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.reporting.dagformer import figures, measured
from dynaroute.reporting.dagformer.page import best_blind, summary, values
from dynaroute.reporting.dagformer.results import DATA, read_analyses, read_comparisons, read_results, read_variant
from dynaroute.reporting.inputs import read_benchmark
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import duration
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint

FIGURES = [Path(f"reports/dagformer/{name}.png") for name in ("topology", "edges_closed", "planted")]
PUBLISHED = Path("reports/reference.yaml")
REFERENCE = ("reference_difference", "reference_low", "reference_high")  # columns of variants.csv

pytestmark = pytest.mark.usefixtures("tree")


def parts() -> tuple:
    settings = load_settings()
    return read_results(settings), read_comparisons(), read_analyses(settings)


def page(reference: dict | None = None) -> str:
    own = reference or read_record(PUBLISHED)["dagformer"]
    tokens = read_record("data/tokens/docs/metadata.json")
    return render("dagformer.md", values(*parts(), tokens, own, read_benchmark("stability")))


def section(text: str, heading: str) -> str:
    """What follows the heading that holds a text, up to the next one."""
    (found,) = re.findall(rf"^#+ [^\n]*{re.escape(heading)}[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    return found


def set_variants(**variants: dict | None) -> None:
    """Adds variants to params.yaml, which did what P1 did, or takes some out, {name: None}; and compares."""

    def change(params: dict) -> None:
        own = params["variants"] | {name: knobs and {"from": "base", **knobs} for name, knobs in variants.items()}
        params["variants"] = {name: knobs for name, knobs in own.items() if knobs}
        if "planted_P1" not in params["variants"]:
            del params["analysis"]["primary"]["p"]

    edit_yaml("params.yaml", change)
    settings = load_settings()
    for name in settings.variants.keys() & variants.keys():
        for part in ("train", "eval"):
            shutil.copytree(DATA / part / "P1", DATA / part / name)
        shutil.copyfile(DATA / "measured/P1.json", DATA / f"measured/{name}.json")
        knobs = settings.variant(name).model_dump()
        edit_json(DATA / f"train/{name}/run.json", lambda data, knobs=knobs: data.update(knobs=knobs))
    import_module("compare_variants").main(settings)


def interval(row: dict | pd.Series, *columns: str, digits: int = 4) -> str:
    values = [row[column] for column in columns or ("mean", "low", "high")]
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in values)  # zero has no sign of its own
    return f"{mean} [{low}, {high}]"


def evaluated(name: str, protocol: str = "window") -> dict:
    return read_record(DATA / f"eval/{name}/nll.json")[protocol]


# --- the published tables ------------------------------------------------------------------------------------------


def test_every_table_of_the_published_report_is_there_with_its_values():
    set_variants(S1={"tau_final": 5.0}, S2={"rank": 3}, L0={"exempt_first_layer": False})
    text, theirs = page(), read_record(PUBLISHED)["dagformer"]
    for heading, key in (("S0, S1", "identity_init"), ("(S2)", "gradient_flow"), ("(L0)", "first_layer_gated")):
        head, _, *lines = table_rows("\n".join(re.findall(r"^> (\|.*)$", section(text, heading), re.MULTILINE)))
        numbers = [[None if cell == "–" else float(cell.replace(",", "")) for cell in line] for line in lines]
        assert [dict(zip(head, row, strict=True)) for row in numbers] == [dict(row) for row in theirs[key]["rows"]]
    rows = {row[0].replace("*", ""): row[1:] for row in table_rows(section(text, "S0, S1"))}
    assert rows["NLL_base, held-out windows"] == [f"**{evaluated('P1')['nll_baseline']:.4f}**", "2.4569"]
    assert rows["nll_soft"][1] == "2.4500 (-0.3%)"
    assert (rows["mean_A"][1], rows["seq_gate_frac"][1], rows["hyp_gate_frac"][1]) == ("0.975", "0.986", "0.988")


def test_published_numbers_stand_nowhere_but_where_they_are_marked():
    set_variants(S1={"tau_final": 5.0}, S2={"rank": 3}, L0={"exempt_first_layer": False})
    theirs = strange(dict(read_record(PUBLISHED)["dagformer"]))
    results, *_ = parts()
    for text in (page(theirs), measured.section(results, theirs["timing"])):
        assert STRANGE.search(text)
        assert not STRANGE.search(unmarked(text))


# --- values --------------------------------------------------------------------------------------------------------


def test_a_row_of_a_variant_is_what_the_files_say():
    set_variants(A3={"rank": 8}, J0={"base_lr": 0.001}, mine={"rank": 3})
    text = page()
    rows = {row[0]: row for row in table_rows(section(text, "5. P1, P2"))}
    lines = pd.read_csv("reports/dagformer/variants.csv").set_index(["variant", "protocol", "mode"])
    for name, changes in (("A3", "rank 8 (full rank) (too short to tell)"), ("mine", "rank 3 (too short to tell)")):
        line, found = lines.loc[name, "window", "hard"], evaluated(name)
        own = interval(line, "difference", "low", "high")
        against = interval(line, *REFERENCE)
        losses = [f"{found['nll_soft']:.4f}", f"{found['nll_hard']:.4f}"]
        assert rows[name][1:] == [changes, *losses, own, against, f"{found['density_hard']:.3f}"]
        assert line["reference"] == "P1" and [*line[[*GATES]]] == pytest.approx([found[key] for key in GATES])
    assert rows["P1"][4:6] == ["section 1", "–"]  # a primary question shows it
    assert rows["J1"][5] == interval(lines.loc["J1", "window", "hard"], *REFERENCE)
    assert rows["J0"][5] == "–"
    assert not {"planted_P1", "S1"} & rows.keys()


def test_the_primary_questions_stand_first_with_their_answers():
    text, found = page(), read_record(DATA / "comparisons.json")["primary"]
    words = {"better": "yes", "worse": "no, it is worse"}
    rows = table_rows(section(text, "1. The primary"))[2:]
    expected = [[own["question"], words.get(own["answer"], own["answer"]), interval(own)] for own in found]
    assert [[row[0], row[1], row[4]] for row in rows] == expected
    assert {row[2] for row in rows} == {"P1 − baseline", "planted_P1 − random"}
    others = text.split("## 2.")[1].replace("optimised gates are better on their own window", "")  # a check's name
    assert not re.search(r"\b(better|worse|significant\w*)\b(?! than random)", others)


def test_the_analyses_are_what_their_files_say():
    found, text = read_record(DATA / "analysis/P1/topology.json"), page()
    varied, swapped = found["variation"]["window"]["soft"], interval(found["swapped"]["window"])
    row = f"| P1 | {varied['distinct']} | {varied['distance_mean']:.3f} | {varied['information_bits']:.3f} |"
    assert f"{row} {swapped} |" in section(text, "X1, X2")
    oracle, sensitivity = read_record(DATA / "sensitivity/summary.json")["oracle"], section(text, "(X3)")
    assert f"for {oracle['steps']} steps, which closes {oracle['closed']:.0%} of the edges" in " ".join(
        sensitivity.split()
    )
    assert f"| the text that follows it | {interval(oracle['next'])} |" in sensitivity
    removal = pd.read_csv(DATA / "sensitivity/removal.csv").set_index(["order", "fraction"])
    assert f"| least gradient first | {interval(removal.loc['least_gradient', 0.5])} |" in sensitivity
    over = interval(removal.loc["expected_gain", 0.5], "over_random", "low_over_random", "high_over_random")
    assert f"| expected gain first − random | {over} |" in sensitivity


def test_what_methods_found_on_the_planted_base_stands_beside_what_was_planted():
    text, known = section(page(), "10. "), read_record(DATA / "planted/known.json")
    rows = {row[0]: row[1:] for row in table_rows(text)}
    own = read_record(DATA / "planted/methods.json")["planted_P1"]["prefix"]
    mean = [interval(known[protocol]["minus_own"]["mean"]) for protocol in ("window", "prefix")]
    assert rows["the mean of all masks"] == mean
    found, random = rows["planted_P1: logit 15, tau 5→0.2"], evaluated("planted_P1", "prefix")
    assert found[0] == interval(own["above_own"], digits=3)
    assert found[1].startswith(f"{own['escape']['mean']:.0%}".replace("%", " %"))
    assert found[3:5] == [f"{own['probe']['observed']:.0%}", f"{own['agreement']:.0%}"]
    assert found[5] == f"{random['nll_random'] - random['nll_hard']:.3f}"
    assert f"{known['gradients']['closed_positive']:.0%} of the edges that a source's mask closes" in text


def test_the_best_wiring_that_reads_no_text_is_a_control_of_the_planted_base():
    results, _, analyses = parts()
    known, above = analyses.planted["prefix"]["minus_own"], {}
    for name, methods in analyses.methods.items():
        above[name] = methods["prefix"]["above_own"]["mean"]
    blind = min(above["planted_C1"], *(known[key]["mean"] for key in ("mean", "one", "zero")))
    found = best_blind(results, analyses)
    assert found["above"] == blind
    assert found["closed"] == pytest.approx(1 - min(above.values()) / blind)


def test_a_failed_check_names_the_variants_that_failed():
    before = summary(*parts())["failed_checks"]
    edit_json(DATA / "eval/P2/nll.json", lambda data: data["checks"].update(a_new_check=False))
    assert "a new check (evaluation of P2)" in section(page(), "11. ")
    assert summary(*parts())["failed_checks"] == before + 1


def set_s1(hard: float) -> None:
    set_variants(S1={"tau_final": 5.0})
    own = evaluated("P1")["nll_baseline"]
    edit_json(DATA / "eval/S1/nll.json", lambda data: data["window"].update(nll_hard=own * hard, nll_soft=own))


def repeated(changed: list[str]) -> None:
    write_json("reports/benchmarks/stability.json", {"runs": [{}] * 4, "changed": changed})


@pytest.mark.parametrize(
    ("change", "heading", "sentence"),
    [
        (lambda: set_s1(1.009), "S0, S1", "**S1 passes**"),
        (lambda: set_s1(1.011), "S0, S1", "**S1 fails**"),
        (lambda: Path("reports/benchmarks/stability.json").unlink(missing_ok=True), "1. The", "It was not run"),
        (lambda: repeated([]), "1. The", "No answer changed over 4 repetitions"),
        (lambda: repeated(["flow"]), "1. The", "are therefore no conclusions: flow."),
        (lambda: edit_json(DATA / "analysis/P1/topology.json", lambda data: data.update(domains=None)), "X1, X2",
         "X2 compares nothing here"),
    ],
)  # fmt: skip
def test_a_sentence_follows_what_was_found(change, heading, sentence):
    change()
    assert sentence in section(page(), heading)


def test_the_report_and_its_figures_can_be_made_of_p1_alone():
    set_variants(P2=None, J1=None, planted_P1=None, planted_C1=None)
    text = page()
    assert not re.search(r"\*\*S1|\(S2\)|\(L0\)|\(J1\)|standard deviation|planted_", text)
    assert [row[0] for row in table_rows(section(text, "5. P1, P2"))] == ["ID", ":---", "P1"]
    assert [*summary(*parts())] == ["nll_baseline", "nll_P1", "hard_density_P1", "P1_minus_baseline", "failed_checks"]
    import_module("plot_dagformer").main(load_settings())


def test_times_are_those_of_the_files_and_extrapolated_from_them():
    results, *_ = parts()
    own = read_record(DATA / "measured/P1.json")
    text = measured.section(results, read_record(PUBLISHED)["dagformer"]["timing"])
    cells = {row[0]: row[1:] for row in table_rows(text)}
    assert cells["Training step"] == [duration(own["seconds_per_step"]), "about 3 s"]
    assert cells["Model loading"] == [duration(own["loading_seconds"]), "about 10 min"]
    seconds = 1000 * (own["seconds_per_step"] + own["validation_seconds"] / 6)  # a round every 6 steps
    assert cells["1K steps with evaluation (extrapolated)"] == [duration(seconds), "about 70 min"]


def test_settings_without_the_main_variant_are_refused():
    with pytest.raises(DynarouteError, match=r"variants = \['S1'\]: must hold P1"):
        read_results(changed(load_settings(), variants={"S1": {"from": "base"}}))


@pytest.mark.parametrize("name", ["compare_variants", "plot_dagformer", "report_dagformer"])
def test_a_missing_file_is_named_in_one_line(name):
    Path(DATA / "eval/P2/nll.json").unlink()
    with pytest.raises(DynarouteError, match=r"^data/dagformer/eval/P2/nll\.json: cannot be read: [^\n]*$"):
        import_module(name).main(load_settings())


def test_all_documents_are_compared_and_the_curve_of_p1_is_a_plot():
    documents = pd.read_csv(DATA / "eval/P1/nll.csv")["document"].nunique()
    assert read_record(DATA / "comparisons.json")["primary"][0]["documents"] == documents
    assert Path("reports/dagformer/P1.csv").read_bytes() == (DATA / "train/P1/training.csv").read_bytes()


# --- figures -------------------------------------------------------------------------------------------------------


def write_wirings(layers: int, heads: int) -> None:
    """Random wirings of a base of that shape in place of those of P1 and of the planted base."""
    nodes, mask, sizes = layers * heads, dag_mask(layers, heads), {"num_layers": layers, "num_heads": heads}
    gates = {"P1": ("window.mean_hard", (nodes, nodes))}
    gates |= dict.fromkeys(("planted_P1", "planted_C1"), ("prefix.logits", (12, int(mask.sum()))))
    for variant, (name, shape) in gates.items():
        path = DATA / f"eval/{variant}/gates.safetensors"
        tensors, state = load_checkpoint(path)
        save_checkpoint(path, tensors | {name: torch.rand(shape) - 0.5}, state | sizes)
    masks, state = load_checkpoint(DATA / "train/planted/masks.safetensors")
    masks["masks"] = (torch.rand(len(masks["masks"]), nodes, nodes) > 0.5) & mask
    save_checkpoint(DATA / "train/planted/masks.safetensors", masks, state)


def test_figures_are_the_same_whatever_a_user_prefers(tree):
    before = [path.read_bytes() for path in FIGURES]
    (tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "PYTHONHASHSEED": "7"}
    command = [sys.executable, stage_script("plot_dagformer")]
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stderr == ""
    assert [path.read_bytes() for path in FIGURES] == before


@pytest.mark.parametrize(("layers", "heads"), [(3, 2), (16, 16)])
def test_figures_follow_wirings_of_any_size_and_differences(layers, heads):
    before = [path.read_bytes() for path in FIGURES]
    write_wirings(layers, heads)
    rows = pd.read_csv("reports/dagformer/variants.csv")
    rows[["difference", "low", "high"]] += 0.05
    rows.to_csv("reports/dagformer/variants.csv", index=False)
    import_module("plot_dagformer").main(load_settings())
    assert not [path for path, content in zip(FIGURES, before, strict=True) if path.read_bytes() == content]


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_damaged_gates_are_named(content):
    path = DATA / "eval/P1/gates.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DynarouteError, match=f"^{path}: [^\n]*$"):
        import_module("plot_dagformer").main(load_settings())


def test_what_is_found_on_the_planted_base_is_the_mean_hard_wiring_of_each_source():
    variant = read_variant("planted_P1")
    found, (gates, _) = figures.read_recovered(variant), load_checkpoint(DATA / "eval/planted_P1/gates.safetensors")
    assert found.planted.shape == found.found.shape == (len(found.sources), 6, 6)
    first_layer = dag_mask(3, 2)[:2]  # exempt from the cascade: as the logits say
    sources = variant.windows.loc[variant.windows["protocol"] == "prefix", "source"].to_numpy()
    hard = (gates["prefix.logits"] > 0).float()[torch.from_numpy(sources == found.sources[0])]
    expected = hard.mean(0)[: int(first_layer.sum())]
    assert found.found[0][:2][first_layer.numpy()] == pytest.approx(expected.numpy())
