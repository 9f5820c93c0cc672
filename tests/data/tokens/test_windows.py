from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tokens import write_tokens

from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import evenly_spaced
from dynaroute.errors import DynarouteError

SEQ_LEN, TOTAL = 4, 23


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token t of the stream is t, and TOTAL windows can be cut from it."""
    documents = [list(range(SEQ_LEN * TOTAL + 3))]
    return write_tokens(tmp_path_factory.mktemp("tokens"), 300, train=documents)


def make_windows(folder: Path) -> Windows:
    return Windows(TokenShards(folder, "train"), SEQ_LEN, keep_tail=False)


@given(number=st.integers(1, TOTAL))
def test_a_subset_is_windows_spread_evenly_over_all(tokens, number):
    windows = make_windows(tokens)
    subset = evenly_spaced(windows, number, "it")
    indices = list(subset.indices)
    assert len(subset) == len(indices) == number
    assert indices[0] == 0
    assert indices[-1] < TOTAL
    gaps = np.diff([*indices, TOTAL])
    assert gaps.min() >= 1  # each window once, in order
    assert gaps.max() - gaps.min() <= 1
    assert subset.seq_len == SEQ_LEN
    chosen = [number - 1, 0]
    for found, expected in zip(subset.batch(chosen), windows.batch([indices[i] for i in chosen]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("number", [None, TOTAL])
def test_all_windows_are_the_whole(tokens, number):
    windows = make_windows(tokens)
    subset = evenly_spaced(windows, number, "it")
    assert len(subset) == TOTAL
    found, targets = subset.batch(np.arange(TOTAL))  # as the training loop asks
    assert torch.equal(found, windows.batch(range(TOTAL))[0])
    assert torch.equal(targets, found + 1)


def test_asking_for_more_windows_than_there_are_names_the_setting_and_both_numbers(tokens):
    with pytest.raises(DynarouteError, match=r"^params.yaml: a.b = 24: must be at most 23, .* 4 tokens in the train"):
        evenly_spaced(make_windows(tokens), TOTAL + 1, "a.b")


@pytest.mark.parametrize("index", [-1, 5])
def test_a_window_outside_the_subset_is_an_error_though_the_whole_may_have_it(tokens, index):
    with pytest.raises(IndexError, match=f"window {index} of 5"):
        evenly_spaced(make_windows(tokens), 5, "it").batch([0, index])
