"""Results on disk: whole or absent, and read with errors that name the file."""

import errno
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from repository import REPOSITORY

from dynaroute.config import read_yaml
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import (
    move_directory,
    output_directory,
    output_file,
    read_record,
    write_json,
    write_yaml,
)


def listing(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", [output_file, output_directory])
def test_a_result_that_fails_while_it_is_written_leaves_the_old_one(tmp_path, output):
    for content in ("old", "new"):
        try:
            with output(tmp_path / "result") as path:
                (path / "text" if path.is_dir() else path).write_text(content)
                if content == "new":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert list(listing(tmp_path).values()) == ["old"]


def test_what_a_kill_left_half_written_is_not_in_the_next_result(tmp_path):
    (tmp_path / ".result.tmp/below").mkdir(parents=True)
    (tmp_path / ".result.tmp/below/half").write_text("wri")
    with output_directory(tmp_path / "result") as folder:
        (folder / "text").write_text("written")
    assert listing(tmp_path) == {"result/text": "written"}


@pytest.mark.parametrize("same_file_system", [True, False])
def test_a_moved_folder_replaces_the_old_one_also_from_another_file_system(tmp_path, monkeypatch, same_file_system):
    for name, content in (("scratch/run", "new"), ("data/result", "old")):
        write_json(tmp_path / name / f"{content}.json", {"content": content})
    replace = Path.replace

    def refuse(self, target):
        if self == tmp_path / "scratch/run" and not same_file_system:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    move_directory(tmp_path / "scratch/run", tmp_path / "data/result")
    assert list(listing(tmp_path)) == ["data/result/new.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read: No such file"), ('{"a": 1', "damaged, not valid"), ("\xff", "damaged, not valid"),
     ("\0", "damaged, not valid"), ("[" * 10_000, "damaged, not valid"), ("[1]", "must be a mapping, not list")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_a_file_that_is_missing_or_holds_no_mapping_is_named_in_one_line(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(DynarouteError, match=rf"{name}: .*{problem}") as caught:
        read_record(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_missing_names_the_file_at_any_depth(tmp_path):
    write_json(tmp_path / "a.json", {"splits": [{"tokens": 17}]})
    assert read_record(tmp_path / "a.json") == {"splits": [{"tokens": 17}]}
    with pytest.raises(DynarouteError, match=r"a\.json: lacks 'token'"):
        read_record(tmp_path / "a.json")["splits"][0]["token"]


TEXT = st.text() | st.sampled_from(
    ["off", "no", "null", "1e-05", "1e5", "012", "1_000", "1:30", "2020-01-01", "=", "~"]
)
SCALARS = TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)


@given(st.dictionaries(TEXT, st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner))))
def test_yaml_comes_back_as_it_was_written_whether_it_is_read_as_1_1_or_1_2(data):
    with tempfile.TemporaryDirectory() as folder:
        write_yaml(f"{folder}/a.yaml", data)
        assert repr(read_record(f"{folder}/a.yaml")) == repr(read_yaml(f"{folder}/a.yaml")) == repr(data)


def test_yaml_that_is_written_by_hand_reads_the_same_as_1_1_and_as_1_2():
    path = REPOSITORY / "reports/reference.yaml"
    assert repr(read_record(path)) == repr(read_yaml(path))
