"""Results on disk: written whole or not at all, and read back as they were written, or with an error that names them.

A folder that a stage wrote holds the SHA-256 of its files in checksums.json; of single files dvc.lock has the MD5.
"""

import contextlib
import csv
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynaroute.errors import DynarouteError

CHECKSUMS = "checksums.json"
REMEDY = "run the stage that makes it again"


def flush(path: Path) -> None:
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
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
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
        _complete(temporary, {})
        _take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_directory(folder: str | Path, path: str | Path, known: Mapping[str, str]) -> None:
    """Moves a finished folder to `path`, whose old content goes; it may lie on another file system.

    A kill leaves it whole, either where it was or at `path`.

    `known`: the SHA-256 of files by name, which are not read for it once more.
    """
    folder, path = Path(folder), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _complete(folder, known)
    try:
        _take_place(folder, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(folder, temporary)
            _flush_all(temporary)
            _take_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder)


def _complete(folder: Path, known: Mapping[str, str]) -> None:
    """Writes the checksums of a folder, and forces it to disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in files if file != folder / CHECKSUMS}
    write_json(folder / CHECKSUMS, {name: known.get(name) or sha256(file) for name, file in names.items()})
    _flush_all(folder)


def _flush_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        flush(file)


def _take_place(folder: Path, path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    folder.replace(path)
    flush(path.parent)


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
        DynarouteError: the file is missing or damaged, or not the one that was written.
    """
    return _parse_json(checked(path))


def _parse_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # the former also for bytes that are not UTF-8
        raise DynarouteError(f"{path}: damaged, not valid JSON ({error}): {REMEDY}") from error


def write_note(path: str | Path, data: Any) -> None:
    """Writes JSON with its own SHA-256, atomically: how far a run is, which no folder's checksums cover yet."""
    write_json(path, {"sha256": _sha256_of(data), "note": data})


def read_note(path: str | Path) -> Any:
    """Reads what `write_note` wrote.

    Raises:
        DynarouteError: the file is damaged.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("sha256") != _sha256_of(data.get("note")):
        raise DynarouteError(f"{path}: damaged: remove {Path(path).parent} to begin anew")
    return data["note"]


def _sha256_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        DynarouteError: it cannot be read.
    """
    return digest(path, "sha256")


def digest(path: str | Path, algorithm: str) -> str:
    """A hash of a file's bytes, as hexadecimal digits, by an algorithm of hashlib: `sha256`, or DVC's `md5`.

    Raises:
        DynarouteError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage that makes it") from error


def checked(path: str | Path) -> Path:
    """The path, once what is there is known to be what was written: a file, or all files of a folder.

    What no checksum was recorded of is taken as it is: a folder that no stage wrote, and a single file that is read
    outside of `dvc repro` and `dvc exp run`, by hand, when it may well be newer than dvc.lock.

    Raises:
        DynarouteError: naming the file that has changed, is missing, or is no part of the folder as it was written.
    """
    path = Path(path)
    folder = next((folder for folder in (path, *path.parents) if (folder / CHECKSUMS).is_file()), None)
    if folder is not None:
        _compare(folder, path)
    elif "DVC_STAGE" in os.environ and path.is_file():
        expected, found = _recorded_by_dvc(Path.cwd()).get(path.as_posix()), digest(path, "md5")
        if expected not in (None, found):
            raise DynarouteError(f"{path}: MD5 is {found}, but dvc.lock says {expected}: {REMEDY}")
    return path


def _compare(folder: Path, path: Path) -> None:
    """Compares a file of a folder, or all files below `path` in it, with the folder's checksums."""
    recorded = _parse_json(folder / CHECKSUMS)
    if not isinstance(recorded, dict):
        raise DynarouteError(f"{folder / CHECKSUMS}: must be a mapping: {REMEDY}")
    own = path.relative_to(folder)
    if path.is_dir():
        expected = {name for name in recorded if Path(name).is_relative_to(own)}
        found = {file.relative_to(folder).as_posix() for file in path.rglob("*") if file.is_file()} - {CHECKSUMS}
    else:
        expected, found = {own.as_posix()} & recorded.keys(), {own.as_posix()}
    for name in sorted(expected ^ found):
        what = "is missing" if name in expected else f"is not in {CHECKSUMS}"
        raise DynarouteError(f"{folder / name}: {what}: {REMEDY}")
    for name in sorted(found):
        if (digest := sha256(folder / name)) != recorded[name]:
            raise DynarouteError(f"{folder / name}: SHA-256 is {digest}, not {recorded[name]}: {REMEDY}")


@functools.cache
def _recorded_by_dvc(root: Path) -> dict[str, str]:
    """The MD5 of every single file that a stage wrote, from DVC's lock files: read once, for it is slow."""
    from ruamel.yaml import YAML, YAMLError

    recorded: dict[str, str] = {}
    for path in (root / "dvc.lock", root / "corpora/dvc.lock"):
        try:
            stages = YAML(typ="safe").load(path.read_text("utf-8"))["stages"]
            recorded |= {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, YAMLError, TypeError, KeyError, AttributeError) as error:
            raise DynarouteError(f"{path}: cannot be read: {error}: run make recover") from error
    return recorded
