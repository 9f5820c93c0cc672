"""Reads tokens on disk through memory maps, as windows; dynaroute.data.tokens.shard_writer writes them.

A folder of tokens holds, for each split, shards `train-00000.npy` ... of one unbroken stream in which an end-of-text
token follows each document; where each document starts and which source it has; the tokenizer; and metadata.json.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING

import numpy as np

from dynaroute.data.tokens.tokenizers import Tokenizer, load_tokenizer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record

if TYPE_CHECKING:
    import torch  # imported where windows become tensors: tokenizing should not wait for it

IGNORED_TARGET = -100  # the target that cross-entropy ignores


class TokenShards:
    """One split of a tokenized corpus, memory-mapped.

    Attributes:
        num_tokens, num_documents, num_characters: sizes of the split; separators count as tokens.
        vocab_size, padded_vocab_size, eot_id: of the tokenizer.
        sources: names; `document_sources[d]` is an index into them.
        offsets: int64 [num_documents + 1]; document d is tokens [offsets[d], offsets[d + 1]), its end-of-text last.
        metadata: all of metadata.json.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        """Opens a split and checks its files' types and sizes against the metadata.

        Raises:
            DynarouteError: naming the file that is missing or damaged.
        """
        self.directory, self.split = Path(directory), split
        path = self.directory / "metadata.json"
        self.metadata = read_record(path)
        try:
            self.vocab_size: int = self.metadata["vocab_size"]
            self.padded_vocab_size: int = self.metadata["padded_vocab_size"]
            self.eot_id: int = self.metadata["eot_id"]
            self.sources: list[str] = self.metadata["sources"]
            own = self.metadata["splits"][split]
            self.num_tokens: int = own["num_tokens"]
            self.num_documents: int = own["num_documents"]
            self.num_characters: int = own["num_characters"]
            self.unigram_entropy: float = own["unigram_entropy"]
            self._shards = [
                self._open(f"{number:05d}", self.metadata["dtype"], shard["num_tokens"])
                for number, shard in enumerate(own["shards"])
            ]
            self.offsets = self._open("offsets", "int64", self.num_documents + 1)
            self.document_sources = self._open("sources", "int32", self.num_documents)
        except TypeError as error:
            raise DynarouteError(f"{path}: damaged: {error}: tokenize the corpus again") from error
        self._starts = np.cumsum([0, *map(len, self._shards)])
        for file, found in (("shards", self._starts[-1]), (own["offsets"]["file"], self.offsets[-1])):
            if found != self.num_tokens:
                raise DynarouteError(f"{path}: {file} of {split} hold {found} tokens, not {self.num_tokens}")

    def _open(self, name: str, dtype: str, size: int) -> np.ndarray:
        path = self.directory / f"{self.split}-{name}.npy"  # not the metadata's name, which could leave the folder
        try:
            values = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, reads .npy only and never unpickles
        except (OSError, ValueError, TokenError) as error:  # numpy raises TokenError for a damaged header
            raise DynarouteError(f"{path}: missing or damaged: {error}: tokenize the corpus again") from error
        if values.dtype != dtype or values.shape != (size,):
            raise DynarouteError(f"{path}: {values.dtype} {values.shape}, but metadata.json says {dtype} ({size},)")
        return values.view(np.ndarray)  # slices of a plain array are cheaper than of a memmap

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens. Raises DynarouteError if a file of it is missing or damaged."""
        folder = self.directory / "tokenizer"
        tokenizer = load_tokenizer(folder)
        if (tokenizer.vocab_size, tokenizer.eot_id) != (self.vocab_size, self.eot_id):
            raise DynarouteError(f"{folder}: not the tokenizer that made these tokens: tokenize the corpus again")
        return tokenizer

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, fewer at its end, across shard boundaries; uint16 or uint32."""
        stop = min(stop, self.num_tokens)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            part = self._shards[first][start - self._starts[first] : stop - self._starts[first]]
            parts.append(part)
            start += len(part)
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.metadata["dtype"])])


def open_splits(directory: str | Path) -> dict[str, TokenShards]:
    """The splits of a tokenized corpus, by name. Raises DynarouteError if a file is missing or damaged."""
    return {split: TokenShards(directory, split) for split in ("train", "validation", "test")}


class Windows:
    """Non-overlapping windows of T tokens: window i reads tokens [i*T, i*T+T) and predicts [i*T+1, i*T+T+1).

    With `keep_tail` (evaluation) the last window may be incomplete, so that every token but the first is predicted
    exactly once; without it (training) such a window is dropped.
    """

    def __init__(self, shards: TokenShards, seq_len: int, keep_tail: bool) -> None:
        """Raises DynarouteError if there are too few tokens for a single window."""
        self.shards, self.seq_len = shards, seq_len
        predicted = shards.num_tokens - 1
        self._length = max(0, math.ceil(predicted / seq_len) if keep_tail else predicted // seq_len)
        if not self._length:
            needed = 2 if keep_tail else seq_len + 1
            raise DynarouteError(
                f"{shards.directory}: {shards.split} has {shards.num_tokens} tokens, but a window needs {needed}"
            )

    def __len__(self) -> int:
        """The number of windows."""
        return self._length

    def batch(self, indices: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Windows as (tokens, targets), both int64 [B, T].

        Targets are -100 where there is nothing to predict. Past the last token a window reads end-of-text.

        Raises:
            IndexError: there is no such window.
        """
        import torch

        tokens = np.full((len(indices), self.seq_len), self.shards.eot_id, np.int64)
        targets = np.full((len(indices), self.seq_len), IGNORED_TARGET, np.int64)
        for row, index in enumerate(map(int, indices)):
            if not 0 <= index < self._length:
                raise IndexError(f"window {index} of {self._length}")
            start = index * self.seq_len
            stream = self.shards.read(start, start + self.seq_len + 1)
            read, predicted = stream[: self.seq_len], stream[1:]
            tokens[row, : len(read)] = read
            targets[row, : len(predicted)] = predicted
        return torch.from_numpy(tokens), torch.from_numpy(targets)
