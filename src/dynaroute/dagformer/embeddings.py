"""A folder of text vectors: a file for each split, such as `test.npy`, float32 [windows, E], and metadata.json.

The prefix protocol adds `test_prefix.npy`: the same windows, of which the encoder read the first tokens only.

    B batch   t tokens read of a window   E embedding
"""

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.data.tokens.windows import Selection
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import move_directory, read_record, sha256, write_json
from dynaroute.pipeline.scratch import discard

BATCH_TOKENS = 8192
NOTE_WINDOWS = 2**14  # between two progress notes: the most a kill can cost, minutes on a GPU


class Encoder(Protocol):
    """Turns windows into vectors, see `dynaroute.dagformer.encoders`."""

    embedding_size: int  # E
    dtype: torch.dtype  # of its weights and its computation

    def encode(self, tokens: Tensor) -> Tensor:
        """The vectors of windows, [B, E] float32 on the CPU, from their tokens, [B, t] int64."""


def write_embeddings(
    encoder: Encoder,
    identity: dict[str, Any],
    windows: dict[str, Selection],
    prefix_tokens: int | None,
    directory: str | Path,
    scratch: str | Path,
) -> None:
    """Encodes windows into a folder of vectors, atomically; a stopped run resumes from its last progress note.

    Args:
        encoder: the loaded encoder.
        identity: everything that the vectors depend on, for metadata.json.
        windows: by split.
        prefix_tokens: how many tokens of a window the encoder reads for the `_prefix` files; None: no such files.
        directory: the folder, which is replaced.
        scratch: a folder that this run alone uses meanwhile, and removes at the end.

    Raises:
        DynarouteError: the encoder cannot read a window, or returns a number that is not finite.
    """
    scratch = Path(scratch)
    folder, note = scratch / "embeddings", scratch / "progress.json"
    # The number of windows on disk, by file.
    done: dict[str, int] = read_record(note)["windows"] if note.exists() and folder.is_dir() else {}
    folder.mkdir(exist_ok=True)
    parts = {split: (own, own.seq_len) for split, own in windows.items()}
    if prefix_tokens is not None:
        parts |= {f"{split}_prefix": (own, prefix_tokens) for split, own in windows.items()}
    total, files = sum(len(own) for own, _ in parts.values()), {}
    # disable=None: a progress bar on a terminal only
    with tqdm(total=total, initial=sum(done.values()), desc="encode", unit="win", disable=None) as progress:
        for name, (own, tokens_read) in parts.items():
            path = folder / f"{name}.npy"
            for on_disk in _write_vectors(path, encoder, own, tokens_read, done.get(name, 0), progress):
                done[name] = on_disk
                write_json(note, {"windows": done})
            files[name] = {
                "file": path.name, "windows": len(own), "tokens_read": tokens_read, "sha256": sha256(path),
            }  # fmt: skip
    metadata = identity | {"embedding_size": encoder.embedding_size, "files": files}
    write_json(folder / "metadata.json", metadata)
    move_directory(folder, directory)
    discard(scratch)


def _write_vectors(
    path: Path, encoder: Encoder, windows: Selection, tokens_read: int, done: int, progress: tqdm
) -> Iterator[int]:
    """Writes the vectors of the windows from number `done` on; yields how many are on disk after every flush."""
    shape = len(windows), encoder.embedding_size
    # A memory map: millions of windows need not fit into memory.
    vectors = _reopen(path, shape) if done else np.lib.format.open_memmap(path, "w+", "<f4", shape)
    size = max(1, BATCH_TOKENS // tokens_read)
    flushed = done
    for start in range(done, len(windows), size):
        indices = range(start, min(start + size, len(windows)))
        tokens, _ = windows.batch(indices)
        encoded = encoder.encode(tokens[:, :tokens_read]).numpy()  # [B, E]
        if not np.isfinite(encoded).all():
            raise DynarouteError(f"the encoder returns non-finite numbers for windows {start} to {indices[-1]}")
        vectors[start : indices[-1] + 1] = encoded
        progress.update(len(indices))
        if indices[-1] + 1 >= min(flushed + NOTE_WINDOWS, len(windows)):
            vectors.flush()
            flushed = indices[-1] + 1
            yield flushed


def _reopen(path: Path, shape: tuple[int, int]) -> np.memmap:
    try:
        vectors = np.lib.format.open_memmap(path, "r+")
        if vectors.dtype == "<f4" and vectors.shape == shape:
            return vectors
        found = f"{vectors.dtype} {vectors.shape}"
    except (OSError, ValueError, TokenError) as error:
        found = error
    raise DynarouteError(f"{path}: damaged: {found}: remove {path.parents[1]} to start again")


def load_embeddings(directory: str | Path) -> dict[str, np.ndarray]:
    """Vectors by file name without its ending.

    Returns:
        float32 [windows, E] each, memory-mapped copy-on-write: torch accepts them, and no file can change.

    Raises:
        DynarouteError: naming the file that is missing, damaged or not what metadata.json says.
    """
    directory = Path(directory)
    metadata = read_record(directory / "metadata.json")
    size, files = metadata["embedding_size"], metadata["files"]
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise DynarouteError(f"{directory / 'metadata.json'}: damaged: files must be a mapping of plain file names")
    return {name: _open_vectors(directory / f"{name}.npy", own["windows"], size) for name, own in files.items()}


def _open_vectors(path: Path, windows: int, size: int) -> np.ndarray:
    try:
        vectors = np.lib.format.open_memmap(path, mode="c")  # reads .npy only, never a pickle
    except (OSError, ValueError, TokenError) as error:
        raise DynarouteError(f"{path}: missing or damaged: {error}: run the stage encode_windows again") from error
    if vectors.dtype != "<f4" or vectors.shape != (windows, size):
        found = f"{vectors.dtype} {vectors.shape}"
        raise DynarouteError(f"{path}: {found}, but metadata.json says float32 {(windows, size)}")
    return vectors.view(np.ndarray)
