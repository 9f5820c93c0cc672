"""Scratch folders: one holder at a time, whoever waits, and whatever the holder leaves behind."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.scratch import discard, exclusive


class Second:
    """Another run on the same folder, in a thread: the system tells locks of one process apart by the opened file."""

    def __init__(self, folder: Path, work: Callable[[], None]) -> None:
        self.waiting = threading.Event()
        self._folder, self._work = folder, work
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self.waiting.wait(60)

    def _run(self) -> None:
        with exclusive(self._folder, while_waiting=self.waiting.set):
            self._work()

    def ended(self) -> bool:
        self._thread.join(60)
        return not self._thread.is_alive()


def test_a_second_waits_while_the_first_works_says_for_whom_and_goes_on_from_what_it_left(tmp_path, capsys):
    folder, found = tmp_path / "stage/run", []
    with exclusive(folder):
        second = Second(folder, lambda: found.append((folder / "checkpoint").read_text()))
        for _ in range(3):  # it looks again and again
            second.waiting.clear()
            assert second.waiting.wait(60)
        assert not found
        (folder / "checkpoint").write_text("step 3")
    assert second.ended()
    assert found == ["step 3"]
    said = f"{folder}: process {os.getpid()} is at work with these settings: waiting for it\n"
    assert capsys.readouterr().err == said


def test_what_the_first_discards_the_second_has_anew_and_a_third_stays_out(tmp_path):
    folder, found = tmp_path / "stage/run", []

    def work() -> None:
        found.append(sorted(path.name for path in folder.iterdir()))
        with pytest.raises(DynarouteError, match=f"process {os.getpid()} is already at work"), exclusive(folder, 0.0):
            found.append("a third was let in")

    with exclusive(folder):
        (folder / "checkpoint").touch()
        second = Second(folder, work)
        discard(folder)
    assert second.ended()
    assert found == [["lock"]]


def test_a_folder_that_is_removed_between_two_looks_is_made_again(tmp_path, monkeypatch):
    folder, path_open, removed = tmp_path / "stage/run", Path.open, []

    def remove_first(path: Path, *arguments: str, **options: str) -> object:
        if path.name == "lock" and not removed:
            removed.append(path)
            folder.rmdir()
        return path_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", remove_first)
    with exclusive(folder):
        assert (folder / "lock").exists()
    assert removed


def test_patience_ends_with_the_name_of_the_holder(tmp_path):
    with exclusive(tmp_path), pytest.raises(DynarouteError) as caught, exclusive(tmp_path, 0.0):
        pass
    expected = f"{tmp_path}: process {os.getpid()} is already at work with these settings; wait for it, or stop it"
    assert str(caught.value) == expected
