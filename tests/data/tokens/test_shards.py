import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokens import write_tokens

from dynaroute.data.tokens.shard_writer import ShardWriter, padded, token_dtype
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.errors import DynarouteError

VOCABULARY = 300
EOT = 7
DOCUMENTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), min_size=1, max_size=12)


def write(folder: Path, documents: list[list[int]], shard_tokens: int = 8, vocab_size: int = VOCABULARY) -> Path:
    """A folder of tokens with one split, in which documents come from the sources "a" and "b" in turn."""
    return write_tokens(folder, vocab_size, EOT, ["a", "b"], shard_tokens, train=documents)


@given(DOCUMENTS, st.integers(1, 30), st.integers(1, 25), st.booleans())
@settings(max_examples=60, deadline=None)
def test_windows_over_shards_equal_slices_of_the_plain_concatenation(documents, shard_tokens, seq_len, keep_tail):
    stream = np.concatenate(documents)
    with tempfile.TemporaryDirectory() as folder:
        shards = TokenShards(write(Path(folder), documents, shard_tokens), "train")
        predicted = len(stream) - 1
        length = math.ceil(predicted / seq_len) if keep_tail else predicted // seq_len
        if length == 0:
            with pytest.raises(DynarouteError, match="a window needs"):
                Windows(shards, seq_len, keep_tail)
            return
        windows = Windows(shards, seq_len, keep_tail)
        assert len(windows) == length
        tokens, targets = windows.batch(range(length))
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (length, seq_len)
    tokens, targets = tokens.numpy().ravel(), targets.numpy().ravel()
    count = min(predicted, length * seq_len)
    assert (targets[:count] == stream[1 : count + 1]).all()  # each token but the first, once and in order
    assert (targets[count:] == -100).all()
    assert (tokens[:count] == stream[:count]).all()
    assert (tokens[len(stream) :] == EOT).all()


@given(DOCUMENTS, st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_any_stretch_of_tokens_is_read_across_the_borders_of_shards(documents, shard_tokens, data):
    stream = np.concatenate(documents)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream) + 5))
    with tempfile.TemporaryDirectory() as folder:
        shards = TokenShards(write(Path(folder), documents, shard_tokens), "train")
        assert shards.num_tokens == len(stream)
        assert len(list(Path(folder).glob("train-0*.npy"))) == math.ceil(len(stream) / shard_tokens)
        assert shards.read(start, stop).tolist() == stream[start:stop].tolist()


def test_documents_are_found_again_by_offset_and_source(tmp_path):
    documents = [[1, 2, EOT], [EOT], [3, 4, 5, 6, 7, 8, 9, 10, 11, EOT]]
    shards = TokenShards(write(tmp_path, documents), "train")
    for index, ids in enumerate(documents):
        assert shards.read(shards.offsets[index], shards.offsets[index + 1]).tolist() == ids
    assert [shards.sources[index] for index in shards.document_sources] == ["a", "b", "a"]
    own = shards.metadata["splits"]["train"]
    assert own["tokens_by_source"] == {"a": 13, "b": 1}
    assert (shards.num_documents, shards.num_characters) == (3, 42)


def test_unigram_entropy_is_that_of_the_splits_own_tokens(tmp_path):
    shards = TokenShards(write(tmp_path, [[1, 1, 2, 2], [3, 3, 4, 4], [5] * 8]), "train")
    # 1 to 4 with probability 1/8 each, 5 with 1/2: 4/8 log 8 + 1/2 log 2 = 2 log 2
    assert shards.unigram_entropy == pytest.approx(2 * math.log(2))


def test_a_batch_takes_windows_in_any_order_and_refuses_others(tmp_path):
    windows = Windows(TokenShards(write(tmp_path, [list(range(20))]), "train"), 5, keep_tail=True)
    tokens, targets = windows.batch(torch.tensor([3, 0]))
    assert tokens.tolist() == [[15, 16, 17, 18, 19], [0, 1, 2, 3, 4]]
    assert targets.tolist() == [[16, 17, 18, 19, -100], [1, 2, 3, 4, 5]]
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"window {index} of 4"):
            windows.batch([index])


@pytest.mark.parametrize(
    ("vocab_size", "size", "dtype"),
    [(50257, 50304, "uint16"), (4096, 4096, "uint16"), (65536, 65536, "uint16"), (65537, 65600, "uint32")],
)
def test_the_vocabulary_is_padded_to_64_and_decides_the_type(tmp_path, vocab_size, size, dtype):
    assert (padded(vocab_size), token_dtype(vocab_size)) == (size, dtype)
    shards = TokenShards(write(tmp_path, [[0, vocab_size - 1]], vocab_size=vocab_size), "train")
    assert shards.read(0, 2).tolist() == [0, vocab_size - 1]
    assert np.load(tmp_path / "train-00000.npy", mmap_mode="r", allow_pickle=False).dtype == dtype


def test_a_split_without_documents_opens_but_has_no_windows(tmp_path):
    shards = TokenShards(write(tmp_path, []), "train")
    assert (shards.num_tokens, shards.num_documents, shards.unigram_entropy) == (0, 0, 0)
    assert len(shards.read(0, 10)) == 0
    with pytest.raises(DynarouteError, match="train has 0 tokens"):
        Windows(shards, 1, keep_tail=True)


def test_time_is_near_linear_in_the_number_of_sources(tmp_path):
    """A quadratic writer takes 13 s for this."""
    sources, started = {"first": 0}, time.process_time()
    writer = ShardWriter(tmp_path, "train", sources, VOCABULARY)
    for number in range(20_000):
        writer.write([1, EOT], f"file {number}", 3)
    writer.write([1, EOT], "file 7", 3)
    metadata = writer.close()
    assert time.process_time() - started < 4
    assert list(metadata["tokens_by_source"]) == list(sources) == ["first", *(f"file {n}" for n in range(20_000))]
    assert metadata["tokens_by_source"]["file 7"] == 4
    assert np.load(tmp_path / "train-sources.npy").tolist() == [*range(1, 20_001), 8]


# --- damage ------------------------------------------------------------------------------------------------------


DAMAGES = {
    "missing": Path.unlink,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "of another type": lambda path: np.save(path, np.load(path).astype(np.uint32)),
    "shorter": lambda path: np.save(path, np.load(path)[:-1]),
    "an archive": lambda path: np.savez(path.open("wb"), np.arange(3)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["train-00001.npy", "train-offsets.npy", "train-sources.npy"])
def test_a_damaged_file_is_named_when_it_is_opened(tmp_path, file, damage):
    write(tmp_path, [list(range(20)), [1, 2]])
    damage(tmp_path / file)
    with pytest.raises(DynarouteError, match=file):
        TokenShards(tmp_path, "train")


def test_metadata_that_is_missing_or_incomplete_is_named(tmp_path):
    with pytest.raises(DynarouteError, match=r"metadata\.json: cannot be read"):
        TokenShards(tmp_path, "train")
    write(tmp_path, [[1, 2]])
    with pytest.raises(DynarouteError, match=r"metadata\.json: lacks 'dev'"):
        TokenShards(tmp_path, "dev")
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    metadata["splits"]["train"]["num_tokens"] = 3
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DynarouteError, match=r"metadata\.json: shards of train hold 2 tokens, not 3"):
        TokenShards(tmp_path, "train")
    del metadata["eot_id"]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DynarouteError, match=r"metadata\.json: lacks 'eot_id'"):
        TokenShards(tmp_path, "train")
