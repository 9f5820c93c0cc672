"""Results on disk: written whole or not at all, and read back with errors that name the file."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynaroute.errors import DynarouteError


def _flush(path: Path) -> None:
    """Forces a file or folder to disk: a rename may otherwise outlive the data that it names in a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block succeeds and goes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # the same name always: what a kill left is written over
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder that takes the place of `path`, old content and all, when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # the same name always: what a kill left is removed
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_directory(folder: str | Path, path: str | Path) -> None:
    """Moves a finished folder to `path`, whose old content goes; it may lie on another file system."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.move(folder, temporary)
    _take_place(temporary, path)


def _take_place(temporary: Path, path: Path) -> None:
    for file in temporary.rglob("*"):
        _flush(file)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)
    _flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with output_file(path) as temporary:
        temporary.write_text(text, "utf-8", newline="\n")


def write_json(path: str | Path, data: Any) -> None:
    """Writes indented JSON atomically; NaN and infinity are refused, since they are not JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the same keys as CSV, atomically; floats keep every digit."""
    with output_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # also what is raised for bytes that are not UTF-8
        raise DynarouteError(f"{path}: damaged, not valid JSON ({error}): run the stage that makes it again") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        DynarouteError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage that makes it") from error
