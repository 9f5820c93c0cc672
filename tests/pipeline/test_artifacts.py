"""Results on disk: read back as they were written, or refused with an error that names the file."""

import hashlib
import json

import pytest

from dynaroute.errors import DynarouteError
from dynaroute.pipeline import artifacts
from dynaroute.pipeline.artifacts import checked, output_directory, read_json, read_note, write_json, write_note


@pytest.fixture
def folder(tmp_path):
    with output_directory(tmp_path / "folder") as made:
        write_json(made / "metadata.json", {"tokens": 17})
        (made / "below").mkdir()
        (made / "below/text").write_text("abc")
    return tmp_path / "folder"


def test_a_folder_that_was_not_touched_is_read(folder):
    assert read_json(folder / "metadata.json") == {"tokens": 17}
    assert checked(folder) == folder
    assert checked(folder / "below") == folder / "below"


def test_a_file_of_a_folder_that_changed_is_named_by_whatever_reads_it(folder):
    (folder / "metadata.json").write_text(json.dumps({"tokens": 18}))
    for read in (lambda: read_json(folder / "metadata.json"), lambda: checked(folder)):
        with pytest.raises(DynarouteError, match=r"folder/metadata\.json: SHA-256 is "):
            read()
    assert checked(folder / "below/text").read_text() == "abc"


def test_a_file_that_came_or_went_is_named(folder):
    (folder / "below/more").write_text("")
    for path in (folder, folder / "below", folder / "below/more"):
        with pytest.raises(DynarouteError, match=r"below/more: is not in checksums\.json"):
            checked(path)
    (folder / "below/more").unlink()
    (folder / "below/text").unlink()
    with pytest.raises(DynarouteError, match="below/text: is missing"):
        checked(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "17", "\xff"])
def test_damaged_checksums_are_named(folder, content):
    (folder / "checksums.json").write_text(content, "latin-1")
    with pytest.raises(DynarouteError, match=r"checksums\.json"):
        checked(folder / "below/text")


def test_checksums_name_nothing_outside_of_their_folder(folder):
    (folder.parent / "outside").write_text("abc")
    recorded = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps(recorded | {"../outside": recorded["below/text"]}))
    with pytest.raises(DynarouteError, match=r"\.\./outside: is missing"):
        checked(folder)


def test_a_single_file_is_compared_with_dvc_lock_where_dvc_runs_the_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifacts._recorded_by_dvc.cache_clear()
    write_json("metrics.json", {"loss": 1})
    digest = hashlib.md5((tmp_path / "metrics.json").read_bytes()).hexdigest()
    lock = {"stages": {"train": {"cmd": "x", "outs": [{"path": "metrics.json", "md5": digest}]}}}
    (tmp_path / "dvc.lock").write_text(json.dumps(lock))
    monkeypatch.setenv("DVC_STAGE", "report")
    assert read_json("metrics.json") == {"loss": 1}
    write_json("metrics.json", {"loss": 2})
    with pytest.raises(DynarouteError, match=r"metrics\.json: MD5 is .* dvc\.lock says"):
        read_json("metrics.json")
    monkeypatch.delenv("DVC_STAGE")
    assert read_json("metrics.json") == {"loss": 2}  # by hand


@pytest.mark.parametrize("change", [("17", "18"), ("tokens", "tokems"), ('"sha256": "', '"sha256": "0'), ("}", "")])
def test_a_note_that_changed_is_refused(tmp_path, change):
    write_note(tmp_path / "note.json", {"tokens": 17})
    assert read_note(tmp_path / "note.json") == {"tokens": 17}
    path = tmp_path / "note.json"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(DynarouteError, match=r"note\.json"):
        read_note(path)
