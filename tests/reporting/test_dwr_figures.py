"""Figures are written, are the same bytes every time, and show what the files say."""

from pathlib import Path

import pytest
from dwr_tree import edit_csv
from report_checks import hashes, run_stage

FIGURES = {
    "reports/figures/dwr_training_curves.png": ("reports/dwr/training.csv", "validation_loss"),
    "reports/figures/dwr_gate_norms.png": ("reports/dwr/router.csv", "gate_norm"),
    "reports/figures/dwr_expert_load.png": ("reports/dwr/router.csv", "load"),
    "reports/figures/dwr_cache_hit_rate.png": ("reports/dwr/simulated_hits.csv", "hit_rate"),
    "reports/figures/measured/dwr_cache_speed.png": ("reports/dwr/cache_timing.csv", "ratio_to_resident"),
}

pytestmark = pytest.mark.usefixtures("tree")


def test_stages_write_the_same_bytes_every_time_and_follow_their_inputs(tree):
    assert run_stage("plot_dwr").stderr == ""
    first = hashes(*FIGURES)
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in FIGURES)
    (tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")  # a user's own taste
    assert run_stage("plot_dwr", PYTHONHASHSEED="7").returncode == 0
    assert hashes(*FIGURES) == first
    for path, column in dict(FIGURES.values()).items():
        edit_csv(path, lambda table, column=column: table.__setitem__(column, table[column] * 0.9))
    edit_csv("reports/dwr/router.csv", lambda table: table.__setitem__("gate_norm", table["gate_norm"] * 1.1))
    assert run_stage("plot_dwr").returncode == 0
    assert all(changed != first[path] for path, changed in hashes(*FIGURES).items())


def test_the_report_stage_writes_both_pages_the_same_every_time():
    pages = ("reports/dwr.md", "reports/dwr_measured.md")
    assert run_stage("report_dwr").stderr == ""
    first = hashes(*pages)
    assert run_stage("report_dwr", PYTHONHASHSEED="7").returncode == 0
    assert hashes(*pages) == first


@pytest.mark.parametrize("name", ["plot_dwr", "report_dwr"])
def test_a_mistake_ends_a_stage_with_one_line(name):
    Path("reports/dwr/training.csv").unlink()
    result = run_stage(name)
    assert result.returncode == 1
    assert result.stderr == f"{name}: reports/dwr/training.csv: cannot be read: No such file or directory\n"


def test_a_model_of_one_layer_and_a_single_validation_can_be_drawn(tree):
    edit_csv("reports/dwr/router.csv", lambda router: router[router["layer"] == 0])
    edit_csv("reports/dwr/training.csv", lambda curve: curve.iloc[[0, 3]])
    result = run_stage("plot_dwr")
    assert (result.returncode, result.stderr) == (0, "")
