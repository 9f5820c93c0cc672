"""Tokens on disk: written as a stream, read through memory maps, cut into windows.

A folder of tokens holds, for each split, shards `train-00000.npy` ... of one unbroken stream in which an end-of-text
token follows each document; where each document starts and which source it has; the tokenizer; and metadata.json.
"""

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynaroute.artifacts import read_json, sha256
from dynaroute.data.tokenizers import Tokenizer, load_tokenizer
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    import torch  # at run time where windows become tensors: tokenizing should not wait for it

SHARD_TOKENS = 2**26
IGNORED_TARGET = -100  # the target that cross-entropy ignores


def padded(vocab_size: int) -> int:
    """The next multiple of 64, the width that matrix products like: 50,257 becomes 50,304."""
    return math.ceil(vocab_size / 64) * 64


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id of the padded vocabulary."""
    return "uint16" if padded(vocab_size) <= 2**16 else "uint32"


class ShardWriter:
    """Writes one split as a stream of documents; memory is bounded by one shard, and 12 bytes a document."""

    def __init__(
        self, folder: Path, split: str, sources: list[str], vocab_size: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        """Starts a split of at most `shard_tokens` tokens a file in an existing folder."""
        self.folder, self.split, self.sources = folder, split, sources
        self._buffer = np.empty(shard_tokens, token_dtype(vocab_size))  # the system gives it memory only as it fills
        self._filled = 0
        self._shards: list[dict[str, Any]] = []
        self._offsets, self._document_sources = array("q", [0]), array("i")
        self._num_characters = 0
        self._tokens_by_source = [0] * len(sources)
        self._counts = np.zeros(vocab_size, np.int64)

    def write(self, ids: list[int], source: str, num_characters: int) -> None:
        """Appends a document: its tokens, end-of-text included."""
        tokens = np.array(ids, self._buffer.dtype)
        index = self.sources.index(source)
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._document_sources.append(index)
        self._num_characters += num_characters
        self._tokens_by_source[index] += len(tokens)
        while len(tokens):
            part = tokens[: len(self._buffer) - self._filled]
            tokens = tokens[len(part) :]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == len(self._buffer):
                self._flush()

    def close(self) -> dict[str, Any]:
        """Writes what is left and returns the split's metadata."""
        self._flush()
        shares = self._counts[self._counts > 0] / self._counts.sum()
        return {
            "num_tokens": self._offsets[-1],
            "num_documents": len(self._document_sources),
            "num_characters": self._num_characters,
            "tokens_by_source": dict(zip(self.sources, self._tokens_by_source, strict=True)),
            "unigram_entropy": float((shares * -np.log(shares)).sum()),  # in nats
            "shards": self._shards,
            "offsets": self._save("offsets", np.frombuffer(self._offsets, np.int64)),
            "document_sources": self._save("sources", np.asarray(self._document_sources, np.int32)),
        }

    def _flush(self) -> None:
        if self._filled:
            tokens = self._buffer[: self._filled]
            for part in np.split(tokens, range(2**20, len(tokens), 2**20)):  # bincount takes 8 bytes a token
                self._counts += np.bincount(part, minlength=len(self._counts))
            shard = self._save(f"{len(self._shards):05d}", tokens)
            self._shards.append({"file": shard["file"], "num_tokens": self._filled, "sha256": shard["sha256"]})
            self._filled = 0

    def _save(self, name: str, values: np.ndarray) -> dict[str, str]:
        path = self.folder / f"{self.split}-{name}.npy"
        np.save(path, values, allow_pickle=False)
        return {"file": path.name, "sha256": sha256(path)}


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
        """Opens a split and checks that files, types and sizes are what the metadata says.

        Raises:
            DynarouteError: naming the file that is missing or damaged.
        """
        self.directory, self.split = Path(directory), split
        path = self.directory / "metadata.json"
        self.metadata = read_json(path)
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
            self._files: list[dict[str, Any]] = [*own["shards"], own["offsets"], own["document_sources"]]
            self._shards = [self._open(s["file"], self.metadata["dtype"], s["num_tokens"]) for s in own["shards"]]
            self.offsets = self._open(own["offsets"]["file"], "int64", self.num_documents + 1)
            self.document_sources = self._open(own["document_sources"]["file"], "int32", self.num_documents)
        except (KeyError, TypeError) as error:
            raise DynarouteError(f"{path}: lacks {error} (of split {split!r}): tokenize the corpus again") from error
        self._starts = np.cumsum([0, *map(len, self._shards)])
        for file, found in (("shards", self._starts[-1]), (own["offsets"]["file"], self.offsets[-1])):
            if found != self.num_tokens:
                raise DynarouteError(f"{path}: {file} of {split} hold {found} tokens, not {self.num_tokens}")

    def _open(self, name: str, dtype: str, size: int) -> np.ndarray:
        path = self.directory / name
        try:
            values = np.lib.format.open_memmap(path, mode="r")  # np.load, but for .npy alone and never a pickle
        except (OSError, ValueError) as error:
            raise DynarouteError(f"{path}: missing or damaged: {error}: tokenize the corpus again") from error
        if values.dtype != dtype or values.shape != (size,):
            raise DynarouteError(f"{path}: {values.dtype} {values.shape}, but metadata.json says {dtype} ({size},)")
        return values.view(np.ndarray)  # slices of a plain array are cheaper than of a memmap

    def verify(self) -> None:
        """Reads every file of the split and compares its SHA-256.

        Raises:
            DynarouteError: naming the first file that has changed.
        """
        for file in self._files:
            found = sha256(self.directory / file["file"])
            if found != file["sha256"]:
                path = self.directory / file["file"]
                raise DynarouteError(f"{path}: SHA-256 is {found}, not {file['sha256']}: tokenize the corpus again")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens.

        Raises:
            DynarouteError: a file of it is missing or damaged.
        """
        folder = self.directory / "tokenizer"
        tokenizer = load_tokenizer(folder)
        if (tokenizer.vocab_size, tokenizer.eot_id) != (self.vocab_size, self.eot_id):
            raise DynarouteError(f"{folder}: not the tokenizer that made these tokens: tokenize the corpus again")
        return tokenizer

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, cut at its end, across the borders of shards; uint16 or uint32."""
        stop = min(stop, self.num_tokens)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            part = self._shards[first][start - self._starts[first] : stop - self._starts[first]]
            parts.append(part)
            start += len(part)
            first += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.metadata["dtype"])])


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

        Where a window has nothing to predict its target is -100, and past the last token it reads end-of-text.

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
