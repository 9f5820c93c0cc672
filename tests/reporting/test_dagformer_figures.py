"""Figures are the same bytes every time, follow their inputs, and can be drawn of little and of much."""

from pathlib import Path

import plot_dagformer
import pytest
from dagformer_tree import DATA, write_comparisons, write_dagformer_tree, write_wirings
from dwr_tree import edit_csv, edit_yaml
from matplotlib.figure import Figure
from report_checks import hashes, run_stage

from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dagformer import figures
from dynaroute.reporting.dagformer.results import read_variant

NAMES = ("wiring", "distances", "nll_by_step", "gate_gradients", "variants", "edges_closed")
FIGURES = [f"reports/dagformer/{name}.png" for name in NAMES]

pytestmark = pytest.mark.usefixtures("dagformer_tree")


def test_the_stage_writes_the_same_bytes_every_time_and_follows_its_inputs(dagformer_tree):
    plot_dagformer.main(load_settings())
    first = hashes(*FIGURES)
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in FIGURES)
    (dagformer_tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")  # a user's own taste
    assert run_stage("plot_dagformer", PYTHONHASHSEED="7").stderr == ""
    assert hashes(*FIGURES) == first

    def change(curve):
        for column in ("validation_nll_soft", "train_gate_slope"):
            curve[column] *= 0.9

    edit_csv(DATA / "train/P1/training.csv", change)
    write_wirings(Path(), 77)
    columns = ["difference", "low", "high"]
    edit_csv("reports/dagformer/variants.csv", lambda rows: rows.__setitem__(columns, rows[columns] * 2))
    plot_dagformer.main(load_settings())
    assert all(changed != first[path] for path, changed in hashes(*FIGURES).items())


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_damaged_gates_are_named(content):
    path = DATA / "eval/P1/gates.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DynarouteError, match=f"^{path}: [^\n]*$"):
        plot_dagformer.main(load_settings())


def test_p1_alone_can_be_drawn():
    def change(params: dict) -> None:
        params["variants"] = {"P1": {"from": "base"}}
        params["analysis"]["variants"] = ["P1"]
        params["analysis"]["primary"] = {"learned": params["analysis"]["primary"]["learned"] | {"left": ["P1"]}}

    edit_yaml("params.yaml", change)
    write_comparisons()
    plot_dagformer.main(load_settings())


def test_a_base_of_many_layers_and_variants_that_equal_the_baseline_can_be_drawn(tmp_path, monkeypatch):
    root = tmp_path / "large"
    root.mkdir()
    write_dagformer_tree(root, layers=16, heads=16)
    monkeypatch.chdir(root)
    for name in load_settings().variants:
        edit_csv(DATA / f"eval/{name}/nll.csv", lambda rows: rows.update({"nll_hard": rows["nll_baseline"]}))
    write_comparisons()
    plot_dagformer.main(load_settings())


def test_every_panel_of_the_curves_is_a_variant_and_all_have_one_scale(monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    curves = {name: read_variant(name).curve for name in ("S1", "S2", "P1", "L0")}
    figures.plot_nll(curves, "nll.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == list(curves)
    assert len({axes.get_ylim() for axes in drawn[0].axes}) == 1
