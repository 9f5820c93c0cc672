"""How much of a held-out split stands word for word in the training split, though no document is in both."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dynaroute.data.shards import TokenShards

FACTORS = np.random.default_rng(1).integers(0, 2**63, 5, np.uint64) * np.uint64(2) + np.uint64(1)
SPAN = 2 ** len(FACTORS)  # tokens that must be the same in a row: 32
MAX_TRAINING_TOKENS = 10**8  # of a corpus that is looked through: seconds for each 10 million
CHUNK = 2**22  # tokens of the training split that are in memory at once


def shared_share(directory: str | Path, split: str) -> float | None:
    """The share of a split's tokens that lie in spans of SPAN tokens which also stand in the training split.

    Spans are told apart by 64-bit hashes, so a false match is next to impossible.

    Args:
        directory: a folder of tokens.
        split: the held-out one.

    Returns:
        Between 0 and 1, 0 for an empty split; None if the training split has more than MAX_TRAINING_TOKENS.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    training, held_out = TokenShards(directory, "train"), TokenShards(directory, split)
    if training.num_tokens > MAX_TRAINING_TOKENS:
        return None
    spans = span_hashes(held_out.read(0, held_out.num_tokens))
    found = np.zeros(len(spans), bool)
    for chunk in _chunks(training):
        found |= np.isin(spans, span_hashes(chunk))
    edges = np.zeros(held_out.num_tokens + 1, np.int64)
    np.add.at(edges, np.flatnonzero(found), 1)
    np.add.at(edges, np.flatnonzero(found) + SPAN, -1)
    return int((edges.cumsum()[:-1] > 0).sum()) / max(1, held_out.num_tokens)


def span_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of every SPAN tokens in a row, uint64 [n - SPAN + 1]; empty if there are fewer tokens."""
    table = np.random.default_rng(0).integers(0, 2**64, int(tokens.max(initial=0)) + 1, np.uint64)
    hashes, length = table[tokens], 1  # numbers are drawn one after the other, so a token's is always the same
    for factor in FACTORS:
        # Two spans in a row are one of twice the length; the odd factor tells their order.
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    return hashes


def _chunks(shards: TokenShards) -> Iterator[np.ndarray]:
    """The stream in parts, which share SPAN - 1 tokens so that no span falls between them."""
    for start in range(0, shards.num_tokens, CHUNK):
        yield shards.read(start, start + CHUNK + SPAN - 1)
