"""Figures are the same bytes every time, follow their inputs, and can be drawn of little and of much."""

from pathlib import Path

import plot_dagformer
import pytest
from dagformer_tree import DATA, write_comparisons, write_dagformer_tree, write_wirings
from dwr_tree import edit_csv, edit_yaml
from report_checks import hashes, run_stage

from dynaroute.config import load_settings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.errors import DynarouteError
from dynaroute.reporting.dagformer import figures
from dynaroute.reporting.dagformer.results import read_variant
from dynaroute.training.checkpoints import load_checkpoint

NAMES = ("topology", "edges_closed", "planted")
FIGURES = [f"reports/dagformer/{name}.png" for name in NAMES]

pytestmark = pytest.mark.usefixtures("dagformer_tree")


def test_the_stage_writes_the_same_bytes_every_time_and_follows_its_inputs(dagformer_tree):
    plot_dagformer.main(load_settings())
    first = hashes(*FIGURES)
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in FIGURES)
    (dagformer_tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")  # a user's own taste
    assert run_stage("plot_dagformer", PYTHONHASHSEED="7").stderr == ""
    assert hashes(*FIGURES) == first

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


def test_what_is_found_on_the_planted_base_is_the_mean_hard_wiring_of_each_source():
    found = figures.read_recovered(read_variant("planted_P1_open"))
    assert (found.sources, found.planted.shape, found.found.shape) == (["numpy", "python"], (2, 12, 12), (2, 12, 12))
    gates, _ = load_checkpoint(DATA / "eval/planted_P1_open/gates.safetensors")
    hard = (gates["prefix.logits"] > 0).float()
    first_layer = dag_mask(4, 3)[:3]  # exempt from the cascade: as the logits say
    numpy_texts = [window for window in range(len(hard)) if window // 2 % 2 == 0]
    expected = hard[numpy_texts].mean(0)[: int(first_layer.sum())]
    assert found.found[0][:3][first_layer.numpy()] == pytest.approx(expected.numpy())
