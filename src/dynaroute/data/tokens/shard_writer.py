"""Writes token shards as a stream; dynaroute.data.tokens.shards describes the format and reads it."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256

SHARD_TOKENS = 2**26


def padded(vocab_size: int) -> int:
    """The next multiple of 64, for fast matrix products: 50,257 becomes 50,304."""
    return math.ceil(vocab_size / 64) * 64


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id of the padded vocabulary."""
    return "uint16" if padded(vocab_size) <= 2**16 else "uint32"


class GrowingArray:
    """A one-dimensional .npy file written from front to back; `close` puts its length into the header.

    Flushed values survive a kill, and writing can resume from any earlier length.
    """

    def __init__(self, path: Path, dtype: str, length: int = 0) -> None:
        """Starts a file, or resumes an existing one after its first `length` values.

        Raises:
            DynarouteError: the file is missing or has fewer values.
        """
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        try:
            self._file = path.open("r+b" if length else "w+b")
        except OSError as error:
            raise DynarouteError(f"{path}: cannot be opened: {error.strerror}") from error
        self._write_header()
        size = self._file.tell() + length * self.dtype.itemsize
        if length and path.stat().st_size < size:
            raise DynarouteError(f"{path}: damaged: has fewer than the {length} values that were written")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def append(self, values: np.ndarray) -> None:
        """Adds values, which must fit into the array's type."""
        self._file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def flush(self) -> None:
        """Forces what was appended to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Completes the file; the same bytes as `np.save` of all values at once."""
        self._file.seek(0)
        self._write_header()
        self.flush()
        self._file.close()

    def _write_header(self) -> None:
        """Writes a header of constant size: numpy leaves room for the length to grow."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class SplitState(NamedTuple):
    """How much of a split is on disk: what `ShardWriter` needs to resume."""

    num_tokens: int
    num_documents: int
    num_characters: int
    tokens_by_source: dict[str, int]


class ShardWriter:
    """Writes one split as a stream of documents in constant memory; a kill loses what came after the last flush."""

    def __init__(
        self,
        folder: Path,
        split: str,
        sources: dict[str, int],
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
        state: SplitState | None = None,
    ) -> None:
        """Starts a split of at most `shard_tokens` tokens per file in an existing folder, or resumes one.

        Args:
            sources: numbers of the documents' sources, in order; new sources are added as they come.
            state: what `flush` returned; everything written later is dropped.

        Raises:
            DynarouteError: what was written earlier is damaged.
        """
        self.folder, self.split, self.sources = folder, split, sources
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        state = state or SplitState(0, 0, 0, {})
        self.num_tokens, self._num_characters = state.num_tokens, state.num_characters
        self._tokens_by_source = Counter(state.tokens_by_source)
        documents = state.num_documents
        self._offsets = GrowingArray(self._path("offsets"), "<i8", documents + 1 if documents else 0)
        if not documents:
            self._offsets.append(np.zeros(1))
        self._document_sources = GrowingArray(self._path("sources"), "<i4", documents)
        self._shard: GrowingArray | None = None
        full, rest = divmod(self.num_tokens, shard_tokens)
        for number in range(full):
            self._open_shard(number, shard_tokens).close()  # checks that it is there and complete
        if rest:
            self._shard = self._open_shard(full, rest)
        for late in folder.glob(f"{split}-[0-9]*.npy"):
            if int(late.stem.rpartition("-")[2]) >= full + bool(rest):
                late.unlink()

    def write(self, ids: Sequence[int] | np.ndarray, source: str, num_characters: int, continues: bool = False) -> None:
        """Appends a document: its tokens, end-of-text included; or all but the last of its parts with `continues`."""
        tokens = np.asarray(ids)
        number = self.sources.setdefault(source, len(self.sources))
        self.num_tokens += len(tokens)
        if not continues:
            self._offsets.append(np.array([self.num_tokens]))
            self._document_sources.append(np.array([number]))
        self._num_characters += num_characters
        self._tokens_by_source[source] += len(tokens)
        while len(tokens):
            if self._shard is None:
                self._shard = self._open_shard((self.num_tokens - len(tokens)) // self.shard_tokens)
            part = tokens[: self.shard_tokens - self._shard.length]
            tokens = tokens[len(part) :]
            self._shard.append(part)
            if self._shard.length == self.shard_tokens:
                self._shard.close()
                self._shard = None

    def flush(self) -> SplitState:
        """Forces everything to disk, and returns the state to resume from."""
        for array in (self._offsets, self._document_sources, self._shard):
            if array is not None:
                array.flush()
        documents = self._document_sources.length
        return SplitState(self.num_tokens, documents, self._num_characters, dict(self._tokens_by_source))

    def close(self) -> dict[str, Any]:
        """Completes the files and returns the split's metadata."""
        for array in (self._offsets, self._document_sources, self._shard):
            if array is not None:
                array.close()
        counts, shards = np.zeros(self.vocab_size, np.int64), []
        for number in range(math.ceil(self.num_tokens / self.shard_tokens)):
            path = self._path(f"{number:05d}")
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            for part in np.split(tokens, range(2**20, len(tokens), 2**20)):  # bincount takes 8 bytes a token
                counts += np.bincount(part, minlength=len(counts))
            shards.append({"file": path.name, "num_tokens": len(tokens), "sha256": sha256(path)})
        shares = counts[counts > 0] / counts.sum()
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self._document_sources.length,
            "num_characters": self._num_characters,
            "tokens_by_source": {source: self._tokens_by_source[source] for source in self.sources},
            "unigram_entropy": float((shares * -np.log(shares)).sum()),  # in nats
            "shards": shards,
            "offsets": self._file("offsets"),
            "document_sources": self._file("sources"),
        }

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.split}-{name}.npy"

    def _file(self, name: str) -> dict[str, str]:
        return {"file": self._path(name).name, "sha256": sha256(self._path(name))}

    def _open_shard(self, number: int, length: int = 0) -> GrowingArray:
        return GrowingArray(self._path(f"{number:05d}"), token_dtype(self.vocab_size), length)
