"""Every stage script explains itself, and a mistake in params.yaml stops it with one line."""

import runpy
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

SCRIPTS = sorted(REPOSITORY.glob("stages/*/*.py"))


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.stem)
def script(request, monkeypatch) -> Path:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return request.param


def test_a_script_explains_itself(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    runpy.run_path(str(script), run_name="__main__")
    assert f"stages/{script.parent.name}/{script.name}" in capsys.readouterr().out


def test_a_mistake_in_params_stops_a_stage_with_one_line(script, tmp_path, monkeypatch):
    params, right, wrong = (REPOSITORY / "params.yaml").read_text(), "  top_k: 2", "  top_k: 99"
    assert params.count(right) == 1
    (tmp_path / "params.yaml").write_text(params.replace(right, wrong))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", f"{script.stem}@P1")  # names the corpus, run or variant
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert str(caught.value) == f"{script.stem}: params.yaml: dwr.top_k = 99: must be at most num_experts = 8"
