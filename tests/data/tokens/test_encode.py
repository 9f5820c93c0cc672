import json
import sys
from pathlib import Path

import collect as collect_stage
import pytest
from repository import REPOSITORY
from resuming import contents
from small_settings import default_settings

from dynaroute.config.data import ByteBPE, Corpus
from dynaroute.data.text import sources as corpora
from dynaroute.data.text.collect import collect
from dynaroute.data.tokens import encode
from dynaroute.data.tokens.encode import tokenize
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.tokenizers import HuggingFaceTokenizer, TiktokenTokenizer, save_tokenizer
from dynaroute.errors import DynarouteError

BPE = ByteBPE(kind="bpe", vocab_size=280)
TEXTS = ["the cat sat on the mat, and the other cat's mat.\n", "def cat(the):\n    return the\n"] * 9


def write_collected(folder: Path, **documents: list[tuple[str, str]]) -> Path:
    """A folder as `collect` writes it, from (source, text) pairs by split."""
    folder.mkdir()
    splits = {}
    for split in ("train", "validation", "test"):
        rows = [
            {"id": f"{split}{index}", "text": text, "source": source}
            for index, (source, text) in enumerate(documents.get(split, []))
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")
        characters = sum(len(row["text"]) for row in rows)
        sources = {row["source"]: {} for row in rows}
        splits[split] = {"documents": len(rows), "characters": characters, "sources": sources}
    (folder / "metadata.json").write_text(json.dumps({"corpus": "c", "splits": splits}))
    return folder


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    train = [("b", f"the cat {index} sat on the mat <|endoftext|> at the end\n" * (index + 1)) for index in range(8)]
    return write_collected(tmp_path / "raw", train=train, test=[("a", "Zwölf mats."), ("b", "the cat")])


def test_every_document_comes_back_from_its_tokens_with_one_separator(tmp_path, collected, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 200)  # several batches
    metadata = tokenize("c", BPE, collected, tmp_path / "tokens", shard_tokens=50)
    for split in ("train", "test"):
        shards = TokenShards(tmp_path / "tokens", split)
        tokenizer = shards.tokenizer()
        rows = [json.loads(line) for line in (collected / f"{split}.jsonl").read_text("utf-8").splitlines()]
        assert shards.num_documents == len(rows)
        for index, row in enumerate(rows):
            ids = shards.read(shards.offsets[index], shards.offsets[index + 1]).tolist()
            assert tokenizer.decode(ids[:-1]) == row["text"]
            assert ids[-1] == shards.eot_id and shards.eot_id not in ids[:-1]
            assert shards.sources[shards.document_sources[index]] == row["source"]
        assert shards.num_characters == sum(len(row["text"]) for row in rows)
        assert sum(metadata["splits"][split]["tokens_by_source"].values()) == shards.num_tokens
    assert metadata["splits"]["validation"]["num_tokens"] == 0
    assert (metadata["tokenizer"], metadata["sources"]) == ({"kind": "bpe", "vocab_size": 280}, ["a", "b"])


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "hub"])
def test_a_document_in_parts_gives_the_bytes_that_it_gives_whole(tmp_path, monkeypatch, request, kind):
    """The tokenizer trained on it included; and no tokenizer ever reads much more than a part."""
    settings = BPE.model_dump()
    if kind == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(request.getfixturevalue("shared_data") / "tiktoken"))
        settings = {"kind": "gpt2"}
    elif kind == "hub":
        save_tokenizer(ByteBPE(kind="bpe", vocab_size=265), TEXTS, tmp_path / "bpe")
        settings = {"kind": "hub", "path": str(tmp_path / "bpe"), "revision": None}
    (tmp_path / "texts").mkdir()
    tab = "\t"
    for number in range(20):
        long = "".join(f"the {n}  cats'll\n\n  sit\r\n{tab * (n % 4)}on mat {number}\u3000Zwölf." for n in range(60))
        (tmp_path / f"texts/{number}.txt").write_text(long if number % 3 == 0 else f"the mat {number} ", "utf-8")
    source = {"kind": "files", "paths": [f"{tmp_path}/texts/*.txt"]}
    split = {"validation": 0.2, "test": 0.2}
    corpus = Corpus.model_validate({"source": source, "split": split, "tokenizer": settings})
    lengths, files = [], {}
    for library in (HuggingFaceTokenizer, TiktokenTokenizer):

        def watched(self, texts, encode_batch=library.encode_batch):
            lengths.extend(map(len, texts))
            return encode_batch(self, texts)

        monkeypatch.setattr(library, "encode_batch", watched)
    for name, size in {"whole": corpora.PART_CHARACTERS, "parts": 150}.items():
        lengths.clear()
        monkeypatch.setattr(corpora, "PART_CHARACTERS", size)
        collect("c", corpus, tmp_path / f"{name}.raw")
        tokenize("c", corpus.tokenizer, tmp_path / f"{name}.raw", tmp_path / name, shard_tokens=500)
        files[name] = contents(tmp_path / name)
        assert (max(lengths) < 200) == (name == "parts")
    assert files["parts"] == files["whole"]


@pytest.mark.parametrize(("split", "kept"), [("train", 0), ("test", 1)])
def test_a_file_that_lacks_documents_is_named(tmp_path, collected, split, kept):
    path = collected / f"{split}.jsonl"
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:kept]), "utf-8")
    with pytest.raises(DynarouteError, match=rf"^{path}: {kept} documents, but metadata\.json says \d+: run the stage"):
        tokenize("c", BPE, collected, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_the_tokenizer_of_other_tokens_is_refused(tmp_path, collected):
    tokenize("c", BPE, collected, tmp_path / "tokens")
    tokenize("c", ByteBPE(kind="bpe", vocab_size=270), collected, tmp_path / "other")
    (tmp_path / "tokens" / "tokenizer").rename(tmp_path / "gone")
    (tmp_path / "other" / "tokenizer").rename(tmp_path / "tokens" / "tokenizer")
    with pytest.raises(DynarouteError, match="not the tokenizer that made these tokens"):
        TokenShards(tmp_path / "tokens", "train").tokenizer()


def test_no_stage_script_hides_a_module_of_the_standard_library():
    assert not {path.stem for path in REPOSITORY.glob("stages/*/*.py")} & sys.stdlib_module_names


def test_a_corpus_that_params_yaml_does_not_name_is_an_error_of_one_line():
    with pytest.raises(DynarouteError, match=r"^corpora\.dcos: no such name; known: docs$"):
        collect_stage.main(default_settings(), "dcos")
