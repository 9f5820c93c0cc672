"""Folders of text vectors: written once by a frozen encoder, read by every variant.

A folder holds a file for each split in it, such as `test.npy`, float32 [windows, E]; where the prefix protocol needs
it `test_prefix.npy`, of the same windows but from their first tokens only; and metadata.json.

    B batch   E embedding
"""

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from dynaroute.data.tokens.windows import WindowSet
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import move_directory, read_record, sha256, write_json
from dynaroute.pipeline.scratch import discard

if TYPE_CHECKING:
    from dynaroute.dagformer.encoders import Encoder

BATCH_TOKENS = 8192
CHECKED_WINDOWS = 256  # of each split, before any is encoded: a window that is too long is rarely the only one
NOTE_WINDOWS = 2**14  # between two notes of how far a run is: what a kill can cost, minutes on a GPU


def write_embeddings(
    encoder: "Encoder",
    identity: dict[str, Any],
    windows: dict[str, WindowSet],
    prefix_tokens: int | None,
    directory: str | Path,
    scratch: str | Path,
) -> None:
    """Encodes the windows of splits into a folder of embeddings, atomically.

    A run that was stopped resumes from its last note.

    Args:
        encoder: the loaded encoder.
        identity: everything that the vectors depend on, for metadata.json.
        windows: by split.
        prefix_tokens: what the encoder reads of a window for the `_prefix` files; None: there are none.
        directory: the folder, which is replaced.
        scratch: where the run lives until then; its own while it runs, and gone after it.

    Raises:
        DynarouteError: the encoder cannot read a window, or gives a number that is not finite.
    """
    scratch = Path(scratch)
    folder, note = scratch / "embeddings", scratch / "progress.json"
    if not folder.is_dir():  # a kill may have come between publishing the folder and discarding the note of it
        note.unlink(missing_ok=True)
    # By file, how many of its windows are on disk.
    done: dict[str, int] = read_record(note)["windows"] if note.exists() else {}
    folder.mkdir(exist_ok=True)
    for own in windows.values():
        for index in range(0, len(own), max(1, len(own) // CHECKED_WINDOWS)):
            encoder.check(own.batch([index])[0])
    parts = {split: (own, own.seq_len) for split, own in windows.items()}
    if prefix_tokens is not None:
        parts |= {f"{split}_prefix": (own, prefix_tokens) for split, own in windows.items()}
    total, files = sum(len(own) for own, _ in parts.values()), {}
    # A progress bar is shown on a terminal only.
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
    path: Path, encoder: "Encoder", windows: WindowSet, tokens_read: int, done: int, progress: tqdm
) -> Iterator[int]:
    """Writes the vectors of the windows from number `done` on; yields now and then how many are on disk."""
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
            raise DynarouteError(f"the encoder gives numbers that are not finite for windows {start} to {indices[-1]}")
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
    raise DynarouteError(f"{path}: damaged: {found}: remove {path.parents[1]} to begin anew")


def load_embeddings(directory: str | Path) -> dict[str, np.ndarray]:
    """Embeddings by the names of their files.

    Returns:
        float32 [windows, E] each, mapped copy on write: torch takes them as they are, and no file can change.

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
        vectors = np.lib.format.open_memmap(path, mode="c")  # .npy alone, and never a pickle
    except (OSError, ValueError, TokenError) as error:
        raise DynarouteError(f"{path}: missing or damaged: {error}: run the stage encode_windows again") from error
    if vectors.dtype != "<f4" or vectors.shape != (windows, size):
        found = f"{vectors.dtype} {vectors.shape}"
        raise DynarouteError(f"{path}: {found}, but metadata.json says float32 {(windows, size)}")
    return vectors.view(np.ndarray)
