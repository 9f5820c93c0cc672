"""How much of a held-out split also occurs word for word in the training split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynaroute.data.tokens.shards import TokenShards

FACTORS = np.random.default_rng(1).integers(0, 2**63, 5, np.uint64) * np.uint64(2) + np.uint64(1)
SPAN = 2 ** len(FACTORS)  # equal tokens in a row that count as shared: 32
MAX_TRAINING_TOKENS = 10**8  # larger corpora are not searched: each 10 million tokens take seconds
MAX_HELD_OUT_TOKENS = 2**23  # nor are larger held-out splits: each token takes some 50 bytes of memory
CHUNK = 2**22  # tokens of the training split that are in memory at once


def shared_shares(directory: str | Path, splits: Sequence[str]) -> dict[str, float | None]:
    """The share of each held-out split's tokens that lie in spans of SPAN tokens which also occur in training.

    Spans are compared by 64-bit hashes, so a false match is next to impossible. A share is between 0 and 1, 0 for an
    empty split, and None if the split has more than MAX_HELD_OUT_TOKENS or training more than MAX_TRAINING_TOKENS.

    Raises:
        DynarouteError: a file is missing.
    """
    training = TokenShards(directory, "train")
    if training.num_tokens > MAX_TRAINING_TOKENS:
        return dict.fromkeys(splits)
    held_out = {split: TokenShards(directory, split) for split in splits}
    spans = {
        split: span_hashes(own.read(0, own.num_tokens))
        for split, own in held_out.items()
        if own.num_tokens <= MAX_HELD_OUT_TOKENS
    }
    found = {split: np.zeros(len(own), bool) for split, own in spans.items()}
    for start in range(0, training.num_tokens, CHUNK):
        hashes = span_hashes(training.read(start, start + CHUNK + SPAN - 1))  # spans across its end too
        for split, own in spans.items():
            found[split] |= np.isin(own, hashes)
    return dict.fromkeys(splits) | {split: _covered(found[split], held_out[split].num_tokens) for split in spans}


def _covered(found: np.ndarray, num_tokens: int) -> float:
    """The share of tokens that lie in a span that was found; `found` is bool [number of spans]."""
    edges = np.zeros(num_tokens + 1, np.int64)
    np.add.at(edges, np.flatnonzero(found), 1)
    np.add.at(edges, np.flatnonzero(found) + SPAN, -1)
    return int((edges.cumsum()[:-1] > 0).sum()) / max(1, num_tokens)


def span_hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of every SPAN consecutive tokens, uint64 [n - SPAN + 1]; empty if there are fewer tokens."""
    table = np.random.default_rng(0).integers(0, 2**64, int(tokens.max(initial=0)) + 1, np.uint64)
    hashes, length = table[tokens], 1  # a token's number does not depend on the table's length
    for factor in FACTORS:
        # Two adjacent spans make one of twice the length; the odd factor makes their order matter.
        hashes = hashes[:-length] * factor + hashes[length:]
        length *= 2
    return hashes
