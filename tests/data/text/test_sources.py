import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dynaroute.config.data import Dolma, Files, Hub
from dynaroute.data.text import sources as corpora
from dynaroute.data.text.sources import Document, documents, matched_files, parts
from dynaroute.errors import DynarouteError


def write_dolma(path: Path, *rows: object) -> Dolma:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return Dolma(kind="dolma", paths=[str(path.parent / "*.gz")])


def row(document_id: str, text: str = "Text.", **more: object) -> dict:
    return {"id": document_id, "text": text, "source": "wiki", **more}


def hub(path: Path, rows: str = "documents", **changes: object) -> Hub:
    settings = {"path": str(path), "name": None, "revision": None, "text_column": "text", "rows": rows}
    return Hub(kind="hub", **settings | changes)


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty dataset folder; what `datasets` makes of it is kept away from the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "dataset").mkdir()
    return tmp_path / "dataset"


def write_split(folder: Path, split: str, texts: list, column: str = "text") -> None:
    parquet.write_table(pyarrow.table({column: texts}), folder / f"{split}-00000-of-00001.parquet")


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


# --- what is common to all kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [["abcdefghij"], ["a", "bcdefgh", "", "ij"], [*"abcdefghij"], ["  ", "  abcdefgh"]])
def test_a_long_document_comes_in_parts(monkeypatch, chunks):
    monkeypatch.setattr(corpora, "PART_CHARACTERS", 4)
    found = list(parts("1", "s", chunks.__iter__, "train"))
    assert "".join(part.text for part in found) == "".join(chunks)
    assert max(len(part.text) for part in found) <= 4
    assert [part.continues for part in found] == [True] * (len(found) - 1) + [False]
    assert {(part.id, part.source, part.split) for part in found} == {("1", "s", "train")}


@pytest.mark.parametrize("chunks", [[], [""], [" ", "\n" * 9, "\t"]])
def test_a_blank_document_is_left_out(monkeypatch, chunks):
    monkeypatch.setattr(corpora, "PART_CHARACTERS", 4)
    assert list(parts("1", "s", chunks.__iter__)) == []


# --- dolma -------------------------------------------------------------------------------------------------------


def test_dolma_documents_come_by_sorted_file_and_then_line_without_blank_ones(tmp_path):
    write_dolma(tmp_path / "b.gz", row("3"))
    (tmp_path / "c.gz").write_bytes(gzip.compress(b""))
    rows = row("1", added="2024-01-01", metadata={}), row("2", "Line\u2028break\r\n"), row("4", ""), row("5", " \n\t")
    source = write_dolma(tmp_path / "a.gz", *rows)
    assert list(documents(source)) == [
        Document("1", "Text.", "wiki"),
        Document("2", "Line\u2028break\r\n", "wiki"),
        Document("3", "Text.", "wiki"),
    ]


def test_real_dolma_shards_are_read_whole(shared_data):
    source = Dolma(kind="dolma", paths=[str(shared_data / "dolma_sample" / "*.json.gz")])
    counts = {}
    for document in documents(source):
        counts[document.source] = counts.get(document.source, 0) + 1
    assert counts == {"wiki": 121, "books": 167, "peps": 363, "rfcs": 436, "code": 204}


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path, compress):
    line = json.dumps({"id": "\ud800", "text": "a\ud800b\0 \U0001f600", "source": "s\udfff"}) + "\n"
    (tmp_path / "a.gz").write_bytes(compress(line.encode()))
    (document,) = documents(Dolma(kind="dolma", paths=[str(tmp_path / "a.gz")]))
    assert document.text == "a\ufffdb\0 \U0001f600"
    assert (document.id, document.source) == ("\ufffd", "s\ufffd")


def test_zstd_is_read_by_what_is_in_a_file_whatever_its_name(tmp_path):
    lines = [json.dumps(row(str(number))).encode() + b"\n" for number in range(4)]
    skipped = b"\x50\x2a\x4d\x18\x02\0\0\0ab"  # a frame that is no content, with which some tools begin
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines[0]) + skipped + zstd(lines[1]))
    (tmp_path / "b.gz").write_bytes(skipped + zstd(lines[2]))
    (tmp_path / "c.zst").write_bytes(gzip.compress(lines[3]))
    found = documents(Dolma(kind="dolma", paths=[str(tmp_path / "*")]))
    assert [document.id for document in found] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"id": "x", "source": "s"}', "text is missing"),
        ('{"id": "x", "text": null, "source": "s"}', "text = null: must be a string"),
        ("[" * 100_000, "not valid JSON"),
        ('{"id": 7, "text": "t", "source": "s"}', "id = 7: must be a string"),
        ('{"id": "x", "text": "t", "source": null}', "source = null: must be a string"),
        ('{"id": "x", "text": "t", "source": {"a": "\\ud800"}}', r'source = {"a": "\\ud800"}: must be a string'),
        ("\udcff", "not valid JSON: 'utf-8' codec"),
    ],
)
def test_a_damaged_line_is_named_after_the_good_ones_were_streamed_counting_blank_ones(tmp_path, line, problem):
    lines = f"\n{json.dumps(row('1'))}\n \r\n{line}\n"
    (tmp_path / "a.gz").write_bytes(gzip.compress(lines.encode(errors="surrogateescape")))
    stream = documents(Dolma(kind="dolma", paths=[str(tmp_path / "a.gz")]))
    assert next(stream).id == "1"
    with pytest.raises(DynarouteError, match=rf"a\.gz, line 4: {problem}"):
        next(stream)


def test_a_line_too_long_to_be_held_is_named_after_those_before_it(tmp_path, monkeypatch):
    lines = [json.dumps(row("1", "a" * size)) + "\n" for size in (50, 50, 51)]
    monkeypatch.setattr(corpora, "MAX_LINE_BYTES", len(lines[0]))
    (tmp_path / "a.gz").write_bytes(gzip.compress("".join(lines).encode()))
    found = documents(Dolma(kind="dolma", paths=[str(tmp_path / "a.gz")]))
    assert [len(next(found).text), len(next(found).text)] == [50, 50]
    with pytest.raises(DynarouteError, match=rf"a\.gz, line 3: longer than {len(lines[0])} bytes"):
        next(found)


LINE = json.dumps(row("1")).encode()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *((zstd(b"\n" + LINE)[:cut], r"damaged gzip or zstd after line \d") for cut in (-1, 6, 20)),
        (gzip.compress(LINE + b"\n" + LINE)[:-12], r"damaged gzip or zstd after line \d"),
        (LINE, "damaged gzip or zstd after line 0"),
        (b"", "an empty file, not even a gzip of nothing: fetch the file again"),
    ],
)
def test_a_file_that_is_not_whole_is_named(tmp_path, content, problem):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DynarouteError, match=rf"a\.gz: {problem}"):
        list(documents(Dolma(kind="dolma", paths=[str(tmp_path / "a.gz")])))


# --- files -------------------------------------------------------------------------------------------------------


def test_files_are_documents_named_by_path_and_sourced_by_folder(tmp_path, monkeypatch):
    (tmp_path / "texts" / "poems").mkdir(parents=True)
    (tmp_path / "texts" / "poems" / "b.txt").write_text("Zwölf", "utf-8")
    (tmp_path / "texts" / "a.txt").write_text("\ufeffMarked", "utf-8")
    monkeypatch.chdir(tmp_path)
    found = list(documents(Files(kind="files", paths=["texts/**/*.txt", "texts/a.txt"])))
    assert found == [Document("texts/a.txt", "Marked", "texts"), Document("texts/poems/b.txt", "Zwölf", "poems")]


def test_a_file_is_read_in_chunks_as_it_is_read_at_once(tmp_path, monkeypatch):
    content = "\ufeffZwölf\r\nBoxkämpfer\r\r\n\U0001f600\ufeff\r"
    (tmp_path / "a.txt").write_text(content, "utf-8", newline="")
    for size in range(1, 12):
        monkeypatch.setattr(corpora, "PART_CHARACTERS", size)
        found = list(documents(Files(kind="files", paths=[str(tmp_path / "a.txt")])))
        assert "".join(part.text for part in found) == (tmp_path / "a.txt").read_text("utf-8-sig")
        (tmp_path / "b.txt").write_bytes(content.encode() + b"\xf0\x9f")
        with pytest.raises(DynarouteError, match=r"b\.txt: not UTF-8 text: "):
            list(documents(Files(kind="files", paths=[str(tmp_path / "b.txt")])))


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("1/texts", "2/texts"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text("X")
    source = Files(kind="files", paths=[f"{tmp_path}/1/texts/*.txt", f"{tmp_path}/2/texts/*.txt"])
    with pytest.raises(DynarouteError, match=r"1/texts/x\.txt and .*2/texts/x\.txt would both be named texts/x\.txt"):
        list(documents(source))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{}/texts/**/*.txt", {"texts/a.txt", "texts/poems/b.txt"}),
        ("{}/te*/poems/*.txt", {"{name}/texts/poems/b.txt"}),
        ("{}/texts/poems/b.txt", {"poems/b.txt"}),
        ("~/texts/[p]*/b.txt", {"texts/poems/b.txt"}),
        ("../{name}/texts/a.txt", {"../{name}/texts/a.txt"}),  # it is not absolute
    ],
)
def test_an_absolute_pattern_gives_ids_that_do_not_depend_on_where_the_folder_lies(
    tmp_path, monkeypatch, pattern, expected
):
    for name in ("here", "there"):
        (tmp_path / name / "texts" / "poems").mkdir(parents=True)
        (tmp_path / name / "texts" / "a.txt").write_text("A")
        (tmp_path / name / "texts" / "poems" / "b.txt").write_text("B")
        monkeypatch.setenv("HOME", str(tmp_path / name))
        monkeypatch.chdir(tmp_path / name)
        found = documents(Files(kind="files", paths=[pattern.format(tmp_path / name, name=name)]))
        assert {document.id for document in found} == {path.format(name=name) for path in expected}


def test_files_are_ordered_by_id_wherever_they_lie(tmp_path):
    for folder in ("1/b", "2/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text("X")
    found = documents(Files(kind="files", paths=[f"{tmp_path}/1/b/*.txt", f"{tmp_path}/2/a/*.txt"]))
    assert [document.id for document in found] == ["a/x.txt", "b/x.txt"]


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "is a folder: for all files below it, add /**/*"),
        ("/", "is a folder"),
        ("~", "is a folder"),
        ("texts", "is a folder"),
        ("texts/", "is a folder"),
        ("texts/**x", "is not a usable pattern: Invalid pattern: '**' can only be"),
        ("x" * 300, "is not a usable pattern"),
        ("texts/\0", "matches no file"),
        ("texts/**", "matches no file"),
    ],
)
def test_a_pattern_that_is_none_is_named(tmp_path, monkeypatch, pattern, problem):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DynarouteError, match=rf"^{re.escape(f'paths: {pattern!r} {problem}')}[^\n]*$"):
        matched_files([pattern])


# --- hub ---------------------------------------------------------------------------------------------------------


def test_hub_rows_become_documents_with_their_official_split(hub_folder):
    write_split(hub_folder, "train", ["One.", "", None, "Two.\n"])
    write_split(hub_folder, "test", ["Three."])
    path = str(hub_folder)
    assert list(documents(hub(hub_folder))) == [
        Document("train-0", "One.", path, "train"),
        Document("train-3", "Two.\n", path, "train"),
        Document("test-0", "Three.", path, "test"),
    ]


def test_a_local_dataset_edited_in_place_is_read_anew(hub_folder):
    for text in ("one", "two"):
        (hub_folder / "train.txt").write_text(text)
        os.utime(hub_folder / "train.txt", (1, 1))
        assert [document.text for document in documents(hub(hub_folder))] == [text]


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_json_lines_and_text_are_datasets_too(hub_folder, kind):
    for split, text in (("train", "One.\nTwo.\n"), ("test", "Three.\n")):
        lines = text.splitlines()
        content = "".join(json.dumps({"text": line, "stars": 3}) + "\n" for line in lines) if kind == "jsonl" else text
        (hub_folder / f"{split}.{kind}").write_text(content)
    found = [(document.id, document.text, document.split) for document in documents(hub(hub_folder))]
    assert found == [("train-0", "One.", "train"), ("train-1", "Two.", "train"), ("test-0", "Three.", "test")]


def test_joined_rows_are_one_document_a_split(hub_folder):
    write_split(hub_folder, "train", ["", " = Title = \n", "", "Body.\n"])
    write_split(hub_folder, "validation", ["Held out."])
    assert [(d.id, d.text) for d in documents(hub(hub_folder, "joined"))] == [
        ("train", "\n\n = Title = \n\n\n\n\nBody.\n"),
        ("validation", "Held out."),
    ]


def test_joined_rows_come_in_parts(hub_folder, monkeypatch):
    monkeypatch.setattr(corpora, "PART_CHARACTERS", 10)
    write_split(hub_folder, "train", [" ", *(f"Row {number}." for number in range(9)), "", "One long last row."])
    whole = "\n\n".join(row for split in corpora._load_hub_dataset(hub(hub_folder)).values() for row in split["text"])
    found = list(documents(hub(hub_folder, "joined")))
    assert "".join(part.text for part in found) == whole
    assert {len(part.text) for part in found[:-1]} <= {*range(11)}
    assert [part.continues for part in found] == [True] * (len(found) - 1) + [False]


def test_rows_that_are_not_utf8_are_repaired(hub_folder):
    """Nothing checks the text of a Parquet file until it becomes Python's."""
    values = pyarrow.array([b"a\xff\0", None, b"b"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    write_split(hub_folder, "train", texts)
    assert [document.text for document in documents(hub(hub_folder))] == ["a\ufffd\0", "b"]


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("content", ["One."], r"'text' is not a column of text in split train .* content \(string\)"),
        ("text", [1, 2], r"text \(int64\)"),
    ],
)
def test_a_column_that_is_missing_or_no_text_is_named_with_those_there_are(hub_folder, column, values, problem):
    write_split(hub_folder, "train", values, column)
    with pytest.raises(DynarouteError, match=problem):
        list(documents(hub(hub_folder)))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, ""),
        ({"dataset.py": b"", "train.jsonl": b'{"text": "a"}\n'}, "Dataset scripts are no longer supported"),
        ({"train.jsonl": b'{"text": "a\\ud800"}\n'}, "JSON parse error: The surrogate pair in string is invalid"),
        ({"train.zip": b"PK\x03\x04"}, "File is not a zip file"),
        ({"README.md": b"---\nconfigs: [\n---\n", "train.txt": b"a"}, "while parsing"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_hub_dataset_that_cannot_be_loaded_is_named_with_the_reason(hub_folder, files, reason):
    for name, content in files.items():
        (hub_folder / name).write_bytes(content)
    with pytest.raises(DynarouteError, match=rf"path: dataset .*dataset cannot be loaded: {reason}") as caught:
        list(documents(hub(hub_folder)))
    assert "\n" not in str(caught.value)


def test_heavy_libraries_are_imported_only_where_they_are_used():
    code = (
        "import sys, dynaroute.pipeline.stage, dynaroute.data.text.sources as light; "
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)); "
        "import dynaroute.data.tokens.encode; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\nset()\n"
