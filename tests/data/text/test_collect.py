import gzip
import json
import random
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dynaroute.config.data import Corpus, Split
from dynaroute.data.text.collect import SPLITS, collect, read_documents, split_of, stable_hash
from dynaroute.errors import DynarouteError

THIRDS = {"validation": 0.3, "test": 0.3}


def dolma_corpus(path: Path, ids: list[str], split: dict | None = None, text: str = "Text of {}.") -> Corpus:
    rows = [{"id": name, "text": text.format(name), "source": name[0]} for name in ids]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    source = {"kind": "dolma", "paths": [str(path)]}
    return Corpus.model_validate({"source": source, "split": split or THIRDS, "tokenizer": {"kind": "gpt2"}})


def hub_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch, **splits: list[str]) -> Corpus:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "dataset").mkdir()
    for name, texts in splits.items():
        parquet.write_table(pyarrow.table({"text": texts}), folder / "dataset" / f"{name}-00000-of-00001.parquet")
    place = {"path": str(folder / "dataset"), "name": None, "revision": None}
    source = {"kind": "hub", **place, "text_column": "text", "rows": "documents"}
    return Corpus.model_validate({"source": source, "split": "official", "tokenizer": {"kind": "gpt2"}})


def split_by_id(directory: Path) -> dict[str, str]:
    return {document.id: split for split in SPLITS for document in read_documents(directory / f"{split}.jsonl")}


def test_every_document_lands_in_one_split_unchanged(tmp_path):
    ids = [f"a-{i}" for i in range(50)]
    collect("c", dolma_corpus(tmp_path / "a.gz", ids, text='{}\n\u2028 "ä" \U0001f600'), tmp_path / "out")
    lines = [line for split in SPLITS for line in (tmp_path / "out" / f"{split}.jsonl").read_text("utf-8").split("\n")]
    found = [json.loads(line) for line in lines if line]
    assert sorted(document["id"] for document in found) == sorted(ids)
    for document in found:
        assert document == {"id": document["id"], "text": f'{document["id"]}\n\u2028 "ä" \U0001f600', "source": "a"}


def test_metadata_counts_documents_and_characters_by_source(tmp_path):
    ids = [f"{source}{index}" for source in "ab" for index in range(30)]
    metadata = collect("c", dolma_corpus(tmp_path / "a.gz", ids, text="Zwölf {}"), tmp_path / "o")
    assert metadata == json.loads((tmp_path / "o" / "metadata.json").read_text())
    for split in SPLITS:
        documents = list(read_documents(tmp_path / "o" / f"{split}.jsonl"))
        own = metadata["splits"][split]
        assert own["documents"] == len(documents)
        assert own["characters"] == sum(len(document.text) for document in documents)
        for source in "ab":
            texts = [document.text for document in documents if document.source == source]
            assert own["sources"][source] == {"documents": len(texts), "characters": sum(map(len, texts))}


def test_splits_are_stable_when_documents_move_and_others_come(tmp_path):
    ids = [f"document-{i}" for i in range(100)]
    collect("c", dolma_corpus(tmp_path / "a.gz", ids), tmp_path / "before")
    more = [*ids, *(f"new-{i}" for i in range(100))]
    random.Random(0).shuffle(more)
    collect("c", dolma_corpus(tmp_path / "a.gz", more), tmp_path / "after")
    before, after = split_by_id(tmp_path / "before"), split_by_id(tmp_path / "after")
    assert {name: after[name] for name in ids} == before


def test_the_hash_of_an_id_never_changes():
    assert stable_hash("numpy/linalg/_linalg.py") == 12_800_766_600_599_749_509
    assert split_of(0, 5, Split(validation=0.1, test=0.1)) == "test"
    assert split_of(2**64 - 1, 5, Split(validation=0.1, test=0.1)) == "train"


@given(st.text(), *[st.just(0.0) | st.floats(1e-12, 0.45)] * 3)
def test_another_validation_share_never_moves_a_document_into_or_out_of_test(name, test, one, other):
    splits = [split_of(stable_hash(name), 0, Split(validation=share, test=test)) for share in (one, other)]
    assert (splits[0] == "test") == (splits[1] == "test")


def test_shares_are_what_was_asked_for():
    drawn = [split_of(stable_hash(f"document {i}"), i, Split(validation=0.1, test=0.3)) for i in range(20_000)]
    assert drawn.count("validation") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert drawn.count("test") / 20_000 == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("split", [THIRDS, {"skip": 40, "validation": 5, "test": 5}])
def test_of_documents_with_the_same_id_and_source_the_first_is_kept(tmp_path, capsys, split):
    rows = [{"id": f"d{i}", "text": f"Text {i}.", "source": "s"} for i in range(50)]
    again = [rows[7] | {"text": "Another."}, rows[7], rows[41] | {"text": " "}, rows[8]]
    other = rows[9] | {"source": "t"}
    corpus = dolma_corpus(tmp_path / "a.gz", [], split)
    for name, own in {"once": [*rows, other], "more": [*rows[:20], *again, *rows[20:], other, rows[3]]}.items():
        (tmp_path / "a.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in own).encode()))
        collect("c", corpus, tmp_path / name)
        for part in SPLITS:
            assert (tmp_path / name / f"{part}.jsonl").read_text() == (tmp_path / "once" / f"{part}.jsonl").read_text()
    assert json.loads((tmp_path / "more/metadata.json").read_text())["duplicates"] == 4
    assert capsys.readouterr().err == "collect c: 4 documents left out: id and source occurred before\n"


def test_a_document_in_parts_is_one_document_in_one_split(tmp_path, monkeypatch):
    ids = [f"{name}{i}" for name in "ab" for i in range(30)]
    whole = collect("c", dolma_corpus(tmp_path / "a.gz", [*ids, "a3"]), tmp_path / "whole")
    monkeypatch.setattr("dynaroute.data.text.sources.PART_CHARACTERS", 3)
    assert collect("c", dolma_corpus(tmp_path / "a.gz", [*ids, "a3"]), tmp_path / "parts") == whole
    for split in SPLITS:
        texts = {}
        for part in read_documents(tmp_path / "parts" / f"{split}.jsonl"):
            texts[part.id] = texts.get(part.id, "") + part.text
        documents = read_documents(tmp_path / "whole" / f"{split}.jsonl")
        assert list(texts.items()) == [(document.id, document.text) for document in documents]


@pytest.mark.parametrize(
    ("ids", "split", "problem"),
    [
        (["one"], {"validation": 0.0, "test": 0.99}, "none of the 1 documents fell to train"),
        (["one"], {"validation": 0.0, "test": 1e-9}, r"fell to test at split\.test = 1e-09"),
        ([], {"validation": 0.0, "test": 0.0}, "none of the 0 documents fell to train"),
    ],
)
def test_an_empty_split_is_refused(tmp_path, ids, split, problem):
    with pytest.raises(DynarouteError, match=problem):
        collect("c", dolma_corpus(tmp_path / "a.gz", ids, split), tmp_path / "out")


def test_a_region_is_held_out_by_place_whatever_follows(tmp_path):
    region = {"skip": 4, "validation": 2, "test": 3}
    for number in (9, 30):
        collect("c", dolma_corpus(tmp_path / "a.gz", [f"d{i}" for i in range(number)], region), tmp_path / "out")
        found = split_by_id(tmp_path / "out")
        assert [name for name, split in found.items() if split == "validation"] == ["d4", "d5"]
        assert [name for name, split in found.items() if split == "test"] == ["d6", "d7", "d8"]
        assert len(found) == number
    with pytest.raises(DynarouteError, match=r"c: 2 of the 8 documents fell to test at split\.test = 3"):
        collect("c", dolma_corpus(tmp_path / "a.gz", [f"d{i}" for i in range(8)], region), tmp_path / "out")


def test_a_split_without_a_share_is_an_empty_file(tmp_path):
    corpus = dolma_corpus(tmp_path / "a.gz", ["one"], {"validation": 0.0, "test": 0.0})
    metadata = collect("c", corpus, tmp_path / "out")
    assert metadata["splits"]["test"] == {"documents": 0, "characters": 0, "sources": {}}
    assert (tmp_path / "out" / "test.jsonl").read_bytes() == b""


def test_official_splits_are_kept_and_a_missing_one_is_named_with_those_there_are(tmp_path, monkeypatch):
    corpus = hub_corpus(tmp_path, monkeypatch, train=["A.", "B."], validation=["C."], test=["D."])
    collect("c", corpus, tmp_path / "out")
    splits = {"train-0": "train", "train-1": "train", "validation-0": "validation", "test-0": "test"}
    assert split_by_id(tmp_path / "out") == splits
    (tmp_path / "dataset/validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DynarouteError, match=r"no official split 'validation' .* there is: train, test"):
        collect("c", corpus, tmp_path / "out")


def test_a_damaged_line_of_a_collected_file_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"id": "1", "text": "t", "source": "s"}\n{"id": "2", "te')
    with pytest.raises(DynarouteError, match=r"train\.jsonl, line 2: not valid JSON"):
        list(read_documents(tmp_path / "train.jsonl"))
    with pytest.raises(DynarouteError, match=r"test\.jsonl: cannot be read: .* run the stage collect"):
        list(read_documents(tmp_path / "test.jsonl"))
