"""What two splits have in common is what a plain search finds."""

from pathlib import Path

import numpy as np
import pytest
from small_tokens import write_tokens

from dynaroute.data.tokens import overlap
from dynaroute.data.tokens.overlap import SPAN, shared_shares

VOCABULARY = 300


def plain_share(held_out: list[int], training: list[int]) -> float:
    """Every span of both, compared as it is."""
    spans = {tuple(training[i : i + SPAN]) for i in range(len(training) - SPAN + 1)}
    covered = set()
    for start in range(len(held_out) - SPAN + 1):
        if tuple(held_out[start : start + SPAN]) in spans:
            covered |= set(range(start, start + SPAN))
    return len(covered) / len(held_out)


def split(folder: Path, training: list[list[int]], test: list[list[int]]) -> float | None:
    return shared_shares(write_tokens(folder, VOCABULARY, train=training, test=test), ["test"])["test"]


@pytest.mark.parametrize("chunk", [7, 50, 2**22])
def test_the_share_is_that_of_a_plain_search(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(overlap, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    training = rng.integers(1, VOCABULARY - 1, 400).tolist()
    own = rng.integers(1, VOCABULARY - 1, 300).tolist()
    test = own[:50] + training[100:140] + own[50:90] + training[180:211] + own[90:] + training[380:] + training[:45]
    other = training[-60:] + own[:200]
    folder = write_tokens(tmp_path, VOCABULARY, train=[training], validation=[other], test=[test])
    splits = {name: overlap.TokenShards(folder, name) for name in ("train", "validation", "test")}
    streams = {name: stream.read(0, stream.num_tokens).tolist() for name, stream in splits.items()}
    expected = {name: plain_share(streams[name], streams["train"]) for name in ("validation", "test")}
    assert 0.1 < expected["test"] < 0.5
    assert 0.1 < expected["validation"] < 0.5
    assert expected["validation"] != expected["test"]
    assert shared_shares(folder, ["validation", "test"]) == pytest.approx(expected)


def test_all_or_nothing(tmp_path):
    text = np.random.default_rng(1).integers(1, VOCABULARY - 1, 100).tolist()
    assert split(tmp_path / "same", [text], [text]) == 1
    assert split(tmp_path / "reversed", [text], [text[::-1]]) == 0
    assert split(tmp_path / "short", [text], [text[: SPAN - 2]]) == 0  # end-of-text makes one more


@pytest.mark.parametrize("limit", ["MAX_TRAINING_TOKENS", "MAX_HELD_OUT_TOKENS"])
def test_a_corpus_that_is_too_large_is_not_searched(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(overlap, limit, 50)
    text = list(range(1, 100))
    assert split(tmp_path, [text], [text]) is None
