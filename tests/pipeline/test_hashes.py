"""Hashes of files: edits are noticed, and a file that is as it was is not read again."""

import os
from pathlib import Path

import pytest

from dynaroute.pipeline import hashes
from dynaroute.pipeline.hashes import hash_files


@pytest.fixture(autouse=True)
def reads(tmp_path, monkeypatch) -> list[Path]:
    """What is read, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    read, sha256 = [], hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: read.append(path) or sha256(path))
    return read


def test_a_file_is_read_again_only_once_its_times_size_or_inode_have_changed(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", -(10**12))  # as if it had last been changed long ago
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    found = hash_files({"weights": path})
    assert found["weights"]["bytes"] == 3
    assert hash_files({"weights": path}) == found
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time of modification are as they were
    assert hash_files({"weights": path}) != found
    path.write_bytes(b"one")
    assert hash_files({"weights": path}) == found
    assert len(reads) == 3


def test_a_file_that_has_just_changed_is_read_again_since_a_clock_may_not_tell(tmp_path, reads):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert hash_files({"a": path})["a"] == hash_files({"b": path})["b"]
    assert len(reads) == 2


def test_damaged_notes_and_files_that_are_gone_cost_no_more_than_time(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED", -(10**12))
    kept, gone = tmp_path / "kept", tmp_path / os.fsdecode(b"gone \xff")
    for path in (kept, gone):
        path.write_bytes(b"text")
    found = hash_files({"kept": kept, "gone": gone})
    (notes,) = tmp_path.glob(".scratch/*/*/notes.json")
    assert "gone" in notes.read_text()
    gone.unlink()
    kept.write_bytes(b"another text")
    assert hash_files({"kept": kept}) != found
    assert "gone" not in notes.read_text()
    notes.write_text("{")
    assert hash_files({"kept": kept})["kept"]["bytes"] == 12
