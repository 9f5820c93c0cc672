from pathlib import Path

import pytest

from dynaroute.errors import DynarouteError
from dynaroute.reporting.inputs import file_size, read_csv


def message(path: Path, read, *arguments) -> str:
    with pytest.raises(DynarouteError) as caught:
        read(path, *arguments)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_csv_is_read_to_the_last_digit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x\n4.828704895548253\n")
    assert read_csv(path, "x")["x"][0] == 4.828704895548253


@pytest.mark.parametrize("content", [None, "", "x,y\n", "y\n1\n", "x,y\n1,2\n3\n1,2,3\n", b"x\n\xff\xfe\n"])
def test_a_table_that_is_missing_or_damaged_is_refused(tmp_path, content):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message(path, read_csv, "x")


def test_the_size_of_a_missing_file_is_refused(tmp_path):
    message(tmp_path / "a", file_size)
