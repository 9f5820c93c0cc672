"""Where text comes from: every kind of source of params.yaml as one stream of documents.

What becomes of the stream, splits and files, is `collection.py`'s part.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dynaroute.config import Dolma, DolmaStream, Files, Hub, InstalledDocs, Source
from dynaroute.data.text import installed_docs
from dynaroute.errors import DynarouteError

# Documents are held whole. A longer line is most often a file without line ends.
MAX_LINE_BYTES, MAX_FILE_BYTES = 2**28, 2**30


class Document(NamedTuple):
    """A text, the name by which its corpus knows it, and the part of the corpus that it comes from."""

    id: str
    text: str
    source: str
    split: str | None = None  # the name of its official split, where the source has such


def documents(source: Source) -> Iterator[Document]:
    """Streams the documents of a source, in an order that only its content decides; blank documents are left out.

    Not those of a `dolma_stream`, which is tokenized as it comes, by `streaming.py`.

    Raises:
        DynarouteError: with the file and line, the column or the package that is missing or damaged.
    """
    match source:
        case InstalledDocs():
            found = _installed_documents(source)
        case Hub():
            found = _hub_documents(source)
        case Dolma():
            found = _dolma_documents(source)
        case Files():
            found = _file_documents(source)
    yield from usable(found)


def usable(found: Iterable[Document]) -> Iterator[Document]:
    """Those documents that are not blank, without what UTF-8 cannot hold."""
    for document in found:
        if document.text and not document.text.isspace():
            yield document._replace(id=_valid_unicode(document.id), text=_valid_unicode(document.text))


def locate(source: Source) -> dict[str, Any]:
    """What a source consists of right now, without reading it: package versions, or files with sizes and times.

    Two results that are equal mean the same text, so this is what `collect` depends on.

    Raises:
        DynarouteError: a package is not installed, or a pattern matches no file.
    """
    match source:
        case InstalledDocs():
            return {"packages": {name: installed_docs.version(name) for name in source.packages}}
        case Hub():
            place = Path(source.path)
            files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []
            return {"path": source.path, "name": source.name, "revision": source.revision, **_file_states(files)}
        case DolmaStream():
            found = [listed] if (listed := Path(source.path) / source.addresses).is_file() else []
            return {"path": source.path, "revision": source.revision, **_file_states(found)}
        case Dolma() | Files():
            return _file_states(list(matched_files(source.paths)))


def matched_files(patterns: list[str]) -> dict[Path, str]:
    """The files that glob patterns match, each once, with names by which they are sorted.

    Relative patterns start at the working directory, and so do the names of what they match. With an absolute pattern,
    or one that starts at a home (`~`), names start with the last folder before the first wildcard: with
    /data/texts/**/*.txt, /data/texts/poems/a.txt is texts/poems/a.txt. So no name depends on where things lie.

    Raises:
        DynarouteError: a pattern is none, or matches no file.
    """
    names: dict[Path, str] = {}
    for pattern in patterns:
        try:
            path = Path(pattern).expanduser()
            if path.is_dir():
                raise DynarouteError(f"paths: {pattern!r} is a folder: for all files below it, add /**/*")
            found = [file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file()]
        except (OSError, RuntimeError, ValueError) as error:
            raise DynarouteError(f"paths: {pattern!r} is not a usable pattern: {error}") from error
        if not found:
            raise DynarouteError(f"paths: {pattern!r} matches no file (seen from {Path.cwd()})")
        start = _last_fixed_folder(path).parent if path.is_absolute() else Path()
        for file in found:
            names.setdefault(file, file.relative_to(start).as_posix())
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _last_fixed_folder(pattern: Path) -> Path:
    return next(folder for folder in pattern.parents if not set("*?[") & set(str(folder)))


def _file_states(files: list[Path]) -> dict[str, Any]:
    states = {path.as_posix(): path.stat() for path in files}
    return {"files": {name: {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns} for name, state in states.items()}}


def _valid_unicode(text: str) -> str:
    r"""Replaces lone halves of surrogate pairs, which an escape like \ud800 makes and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _installed_documents(source: InstalledDocs) -> Iterator[Document]:
    for package, module_id, text in installed_docs.modules(source.packages):
        yield Document(module_id, text, package)


def _hub_documents(source: Hub) -> Iterator[Document]:
    for split, rows in _load_hub_dataset(source).items():
        feature = rows.features.get(source.text_column)
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            columns = ", ".join(f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in rows.features.items())
            raise DynarouteError(
                f"text_column: {source.text_column!r} is not a column of text in split {split} of {source.path}, "
                f"which has: {columns}"
            )
        batches = rows.select_columns(source.text_column).iter(batch_size=1000)  # far faster than row by row
        texts = (text or "" for batch in batches for text in batch[source.text_column])  # a missing value is empty
        if source.rows == "joined":
            yield Document(split, "\n\n".join(texts), source.path, split)
        else:
            for index, text in enumerate(texts):
                yield Document(f"{split}-{index}", text, source.path, split)


def _load_hub_dataset(source: Hub) -> Any:
    import datasets  # takes a second, which only this kind should pay

    try:
        return datasets.load_dataset(source.path, source.name, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        place = ", ".join(part for part in (source.path, source.name, source.revision) if part)
        raise DynarouteError(f"path: dataset {place} cannot be loaded: {reason}") from error


def _dolma_documents(source: Dolma) -> Iterator[Document]:
    for path in matched_files(source.paths):
        try:
            file = path.open("rb")
        except OSError as error:
            raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
        with file:
            yield from read_dolma(file, str(path))


def read_dolma(file: BinaryIO, name: str) -> Iterator[Document]:
    """Streams the documents of one gzip of JSON lines; blank lines are skipped.

    Raises:
        DynarouteError: beginning with `name`; a line or the gzip is damaged, or the file is empty.
    """
    number = 0
    try:
        if not file.read(1):  # which gzip takes for no text; a power cut can leave such a file
            raise DynarouteError(f"{name}: an empty file, not even a gzip of nothing: fetch the file again")
        file.seek(0)
        with gzip.open(file) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise DynarouteError(f"{name}, line {number}: longer than {MAX_LINE_BYTES} bytes: split it up")
                if not line.isspace():
                    yield parse_document(line, f"{name}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DynarouteError(f"{name}: damaged gzip after line {number}: {error}: fetch the file again") from error


def parse_document(line: str | bytes, place: str) -> Document:
    """A document from a JSON line {id, text, source, ...}; other keys are ignored.

    Raises:
        DynarouteError: naming the place, if the line is not such an object.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter where it is nested a thousand levels deep
        raise DynarouteError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DynarouteError(f"{place}: must be an object with id, text and source, not {type(fields).__name__}")
    keys = ("id", "text", "source")
    for key in keys:
        if key not in fields:
            raise DynarouteError(f"{place}: {key} is missing")
        if not isinstance(fields[key], str):
            raise DynarouteError(f"{place}: {key} = {json.dumps(fields[key]):.80}: must be a string")
    return Document(*(fields[key] for key in keys))


def _file_documents(source: Files) -> Iterator[Document]:
    for path, name in matched_files(source.paths).items():
        try:
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise DynarouteError(f"{path}: {size} bytes, more than {MAX_FILE_BYTES}: split it up")
            text = path.read_text("utf-8-sig")  # a byte-order mark is not text
        except UnicodeDecodeError as error:
            raise DynarouteError(f"{path}: not UTF-8 text at byte {error.start}") from error
        except OSError as error:
            raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
        yield Document(name, text, path.absolute().parent.name)
