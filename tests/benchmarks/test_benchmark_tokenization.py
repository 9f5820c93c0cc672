"""The benchmark of tokenization: what it compares does the same work."""

import json
from pathlib import Path

import benchmark_tokenization as benchmark
import pytest
import timing
from small_settings import default_settings

from dynaroute.config.data import GPT2, ByteBPE
from dynaroute.data.text.collect import read_documents
from dynaroute.data.tokens.encode import describe
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.tokenizers import save_tokenizer
from dynaroute.pipeline.artifacts import write_json

BPE = ByteBPE(kind="bpe", vocab_size=280)
TEXTS = ["the cat sat on the mat, Zwölf <|endoftext|>\n" * 20, "def cat(the):\n    return the\n" * 9, "x"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A working directory with a collected corpus and its tokenizer, and a benchmark that takes no time."""
    monkeypatch.chdir(tmp_path)
    corpus = default_settings().dwr.corpus
    collected = tmp_path / "data/raw" / corpus / "train.jsonl"
    collected.parent.mkdir(parents=True)
    rows = [{"id": str(number), "text": text, "source": "s"} for number, text in enumerate(TEXTS)]
    collected.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(BPE, TEXTS, tmp_path / "data/tokens" / corpus / "tokenizer")
    for name, value in {"PIECE": 100, "ROUNDS": 2, "CHARACTERS": sum(map(len, TEXTS))}.items():
        monkeypatch.setattr(benchmark, name, value)
    return collected


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_both_give_the_same_tokens(tree, tmp_path, request, monkeypatch, kind):
    settings = BPE
    if kind == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(request.getfixturevalue("shared_data") / "tiktoken"))
        settings = GPT2(kind="gpt2")
    (tmp_path / "shards").mkdir()
    tokenizer = save_tokenizer(settings, TEXTS, tmp_path / "shards/tokenizer")
    pieces = tmp_path / "pieces.jsonl"
    benchmark.write_pieces(tree, pieces)
    texts = [document.text for document in read_documents(pieces)]
    assert len(texts) > 8
    expected = [token for ids in benchmark.by_library(tokenizer, texts) for token in [*ids, tokenizer.eot_id]]
    splits = {"train": benchmark.by_dynaroute(tokenizer, pieces, tmp_path / "shards")}
    write_json(
        tmp_path / "shards/metadata.json", describe("c", settings, tokenizer) | {"sources": [], "splits": splits}
    )
    assert TokenShards(tmp_path / "shards", "train").read(0, 10**6).tolist() == expected


@pytest.mark.parametrize("characters", [len(TEXTS[0]) + 150, sum(map(len, TEXTS)) + 130])
def test_pieces_are_the_text_up_to_the_limit_and_begin_again_below_it(tree, tmp_path, monkeypatch, characters):
    monkeypatch.setattr(benchmark, "CHARACTERS", characters)
    benchmark.write_pieces(tree, tmp_path / "pieces.jsonl")
    texts = [document.text for document in read_documents(tmp_path / "pieces.jsonl")]
    assert "".join(texts) == ("".join(TEXTS) * 2)[:characters]
    assert max(map(len, texts)) == 100


def test_it_records_throughput_and_the_main_threads_share(tree, tmp_path):
    benchmark.main(default_settings())
    report = json.loads((tmp_path / "reports/benchmarks/tokenization.json").read_text())
    (row,) = report["results"]
    assert row["tokenizer"] == "docs"
    assert row["megabytes_per_second"] > 0 < row["throughput_against_library"]
    assert 0 < row["main_thread_share_of_cpu_time"] <= 1
    assert report["characters"] == sum(map(len, TEXTS))


def test_ratios_are_of_times_of_the_same_round():
    assert timing.quartiles(timing.ratios([1.0, 4.0, 30.0], [1.0, 2.0, 10.0])) == (2.0, [1.0, 3.0])
