"""The campaigns in faults/: that they damage what is read, and that their page counts and words what came of it."""

import json
import random

import pytest
from repository import REPOSITORY
from tiny_pipeline import project_files

LOCK = b"""schema: '2.0'
stages:
  train:
    cmd: python train.py
    deps:
    - path: reports/a.csv
      hash: md5
      md5: 0123456789abcdef0123456789abcdef
      size: 10
    outs:
    - path: data/model
      hash: md5
      md5: 0123456789abcdef0123456789abcdef.dir
      size: 10
      nfiles: 2
    - path: reports/b.json
      hash: md5
      md5: fedcba9876543210fedcba9876543210
      size: 20
"""


@pytest.fixture(autouse=True)
def faults(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "faults"))


def test_a_workspace_starts_without_what_the_pipeline_writes():
    reports = {name for name in project_files() if name.startswith("reports/")}
    assert "reports/reference.yaml" in reports
    assert {name.split("/")[1] for name in reports} <= {"reference.yaml", "benchmarks"}
    assert not [name for name in project_files() if name.endswith("dvc.lock")]


def test_a_lock_file_is_damaged_where_stages_look_and_other_files_anywhere(tmp_path):
    import corruption

    places = corruption.places(tmp_path / "dvc.lock", LOCK)
    own = b"- path: reports/b.json\n      hash: md5\n      md5: fedcba9876543210fedcba9876543210\n"
    assert bytes(LOCK[place] for place in places) == own
    assert list(corruption.places(tmp_path / "b.json", b"{}")) == [0, 1]


def test_damage_is_done_at_its_place_and_changes_the_file():
    import corruption

    content = bytes(range(1, 256)) * 4
    for seed in range(50):
        _, changed = corruption.damage(content, 300, random.Random(seed))
        assert changed != content
        assert changed[:300] == content[:300]


def test_the_page_counts_what_went_well_and_quotes_no_program(tmp_path, monkeypatch):
    import page
    from workspace import with_log

    rows = [
        {"situation": "a queue is killed", "then": "queued again and run", "outcome": "the same bytes"},
        {
            "situation": "a queue is killed",
            "then": "could not be run again",
            "outcome": with_log("failed", "ERROR: unexpected\n\nHaving any troubles? Hit us up at https://dvc.org"),
        },
        {"situation": "the disk is full", "then": "not tried: no right to mount", "outcome": "not tried"},
    ]
    record = {"commit": "abc", "cases_planned": 5, "cases_tried": 3, "rows": rows}
    record["errors"] = {"number 7": "AssertionError: dvc push failed:\nERROR"}
    folder = tmp_path / "reports/reliability"
    folder.mkdir(parents=True)
    (folder / "situations.json").write_text(json.dumps(record))
    monkeypatch.setattr(page, "REPOSITORY", tmp_path)
    page.main()
    text = (tmp_path / "docs/reliability.md").read_text()
    assert "| a queue is killed | 1 | could not be run again | failed |\n" in text
    assert "| the disk is full | 1 | not tried | not tried |\n" in text
    assert "At commit abc, 2 of 5 cases tried; as promised: 1 of 2 cases.\n- number 7: the campaign itself fail" in text
    assert "Having any troubles" not in text
    assert "ERROR" not in text
