"""Figures are written, are the same bytes every time, and show what the files say."""

from pathlib import Path

import pytest
from dagformer_tree import write_comparisons, write_dagformer_tree, write_gates, write_wirings
from dwr_tree import edit_csv, edit_json, edit_yaml
from matplotlib.figure import Figure
from report_checks import hashes, run_stage

from dynaroute.config import load_settings
from dynaroute.reporting.dagformer import figures
from dynaroute.reporting.dagformer.results import read_curve, read_evaluation

NAMES = ("adjacency", "density_by_layer_pair", "nll_by_step", "schedules", "gate_gradients", "variants")
NAMES += ("topology_variance", "domains", "sensitivity", "removal")
FIGURES = [f"reports/figures/dagformer_{name}.png" for name in NAMES]

pytestmark = pytest.mark.usefixtures("dagformer_tree")


def test_stages_write_the_same_bytes_every_time_and_follow_their_inputs(dagformer_tree):
    assert run_stage("plot_dagformer").stderr == ""
    first = hashes(*FIGURES)
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in FIGURES)
    (dagformer_tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")  # a user's own taste
    assert run_stage("plot_dagformer", PYTHONHASHSEED="7").returncode == 0
    assert hashes(*FIGURES) == first

    def change(curve):
        for column in ("validation_nll_soft", "validation_tau", "train_gate_slope"):
            curve[column] *= 0.9

    edit_csv("reports/dagformer/P1/training.csv", change)
    edit_json("reports/dagformer/A3/nll.json", lambda data: data["prefix"]["soft_minus_baseline"].update(high=0.05))
    write_gates(Path("data/eval/P1"), 77)
    write_wirings(Path("data/analysis/P1"), 77)
    edit_csv("reports/dagformer/removal.csv", lambda rows: rows.__setitem__("low", rows["low"] - 0.01))
    edit_csv("reports/dagformer/removal_heads.csv", lambda rows: rows.__setitem__("difference", rows["difference"] * 2))
    assert run_stage("plot_dagformer").returncode == 0
    assert all(changed != first[path] for path, changed in hashes(*FIGURES).items())


def test_the_report_stage_writes_both_pages_the_same_every_time():
    pages = ("reports/dagformer.md", "reports/dagformer_measured.md")
    assert run_stage("report_dagformer").stderr == ""
    first = hashes(*pages)
    assert run_stage("report_dagformer", PYTHONHASHSEED="7").returncode == 0
    assert hashes(*pages) == first


@pytest.mark.parametrize("name", ["plot_dagformer", "report_dagformer"])
def test_a_mistake_ends_a_stage_with_one_line(name):
    Path("reports/dagformer/A2/nll.json").unlink()
    result = run_stage(name)
    assert result.returncode == 1
    assert result.stderr == f"{name}: reports/dagformer/A2/nll.json: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_damaged_gates_are_named(content):
    path = Path("data/eval/P1/gates.safetensors")
    path.unlink() if content is None else path.write_bytes(content)
    result = run_stage("plot_dagformer")
    assert result.returncode == 1
    assert result.stderr.startswith(f"plot_dagformer: {path}: ")
    assert result.stderr.count("\n") == 1


def test_p1_alone_can_be_drawn():
    edit_yaml("params.yaml", lambda params: params.update(variants={"P1": {"from": "base"}}))
    edit_yaml("params.yaml", lambda params: params["analysis"].update(variants=["P1"]))
    write_comparisons(Path(), load_settings())
    result = run_stage("plot_dagformer")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_base_of_many_layers_can_be_drawn(tmp_path, monkeypatch):
    root = tmp_path / "large"
    root.mkdir()
    write_dagformer_tree(root, layers=16, heads=16)
    monkeypatch.chdir(root)
    result = run_stage("plot_dagformer")
    assert (result.returncode, result.stderr) == (0, "")


def test_every_panel_of_the_curves_is_a_variant(monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    curves = {name: read_curve(name) for name in ("S1", "S2", "P1", "P2")}
    figures.plot_nll(curves, "nll.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == list(curves)


def test_variants_that_all_equal_the_baseline_can_be_drawn():
    for name in load_settings().variants:
        for protocol in ("window", "prefix"):
            for mode in ("soft", "hard"):
                found = {"mean": 0.0, "low": 0.0, "high": 0.0}
                path = f"reports/dagformer/{name}/nll.json"
                edit_json(path, lambda data, p=protocol, m=mode, f=found: data[p][f"{m}_minus_baseline"].update(f))
    figures.plot_variants({name: read_evaluation(name) for name in load_settings().variants}, "all_equal.png")
    assert Path("all_equal.png").read_bytes().startswith(b"\x89PNG")
