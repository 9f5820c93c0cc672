"""Writes results completely or not at all, and reads them with errors that name the file.

DVC records the MD5 of every output and detects later changes, so readers do not hash again. docs/reliability.md says
which damage is detected when.
"""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dynaroute.errors import DynarouteError

REMEDY = "delete it and run the stage that writes it again"


def flush(path: Path) -> None:
    """Forces a file or folder to disk: in a power cut, a rename may otherwise survive without the renamed data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces it when the block succeeds and is removed when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # always the same name: the next run overwrites what a kill left
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder that replaces all of `path` when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # always the same name: the next run removes what a kill left
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_directory(folder: str | Path, path: str | Path) -> None:
    """Moves a finished folder to `path`, possibly on another file system, and replaces what is there.

    After a kill the folder is whole in one of the two places.
    """
    folder, path = Path(folder), Path(path)
    try:
        _replace(folder, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with output_directory(path) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
        shutil.rmtree(folder)


def _replace(folder: Path, path: Path) -> None:
    for file in (*folder.rglob("*"), folder):
        flush(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    folder.replace(path)
    flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with output_file(path) as temporary:
        temporary.write_text(text, "utf-8", newline="\n")


def write_json(path: str | Path, data: Any) -> None:
    """Writes indented JSON atomically. Raises ValueError for NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class _Dumper(yaml.SafeDumper):
    """Quotes all strings except plain words, so that readers of YAML 1.1 and 1.2 agree on off, 1e-05 and 012."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, None if data.isidentifier() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def write_yaml(path: str | Path, data: Any) -> None:
    """Writes mappings, lists, strings, numbers, booleans and None as YAML, atomically; `read_record` reads it."""
    write_text(path, yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=math.inf))


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the same keys as CSV, atomically; floats keep every digit."""
    with output_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Record(dict[str, Any]):
    """A mapping read from a file, and so are mappings in it; a missing key is an error that names the file."""

    def __init__(self, data: dict[str, Any], path: str | Path) -> None:
        super().__init__({key: _as_record(value, path) for key, value in data.items()})
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise DynarouteError(f"{self.path}: lacks {key!r}: {REMEDY}")


def _as_record(value: Any, path: str | Path) -> Any:
    if isinstance(value, dict):
        return Record(value, path)
    return [_as_record(item, path) for item in value] if isinstance(value, list) else value


def read_record(path: str | Path) -> Record:
    """Reads a mapping from a JSON or YAML file that this project writes.

    Raises:
        DynarouteError: the file is missing or damaged; later, on access to a key that it lacks.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        data = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError also for bytes that are not UTF-8
        what, reason = path.suffix[1:].upper(), " ".join(str(error).split())
        raise DynarouteError(f"{path}: damaged, not valid {what} ({reason}): {REMEDY}") from error
    if not isinstance(data, dict):
        raise DynarouteError(f"{path}: must be a mapping, not {type(data).__name__}: {REMEDY}")
    return Record(data, path)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits. Raises DynarouteError if the file cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage that makes it") from error
