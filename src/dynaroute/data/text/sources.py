"""Reads every kind of source in params.yaml as one stream of documents; `collect.py` splits and writes it."""

import functools
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dynaroute.config.data import Dolma, Files, Hub, InstalledText, Source
from dynaroute.data.text import installed
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.scratch import hint_of_copy

PART_CHARACTERS = 2**18  # of a document in memory at once
MAX_LINE_BYTES = 2**28  # of a Dolma file; a line is in memory as a whole, and longer ones are mostly no lines


class Document(NamedTuple):
    """A document or a part of one. The id is unique within the source, such as a website or a folder."""

    id: str
    text: str
    source: str
    split: str | None = None  # the name of its official split, where the source has such
    continues: bool = False  # the next one is this document's next part


def documents(source: Source) -> Iterator[Document]:
    """Streams the documents of a source as `parts`, in an order that depends on its content alone.

    A `dolma_stream` is not among them: `tokens/stream.py` tokenizes it while it downloads.

    Raises:
        DynarouteError: naming the file and line, the column or the package that is missing or damaged.
    """
    match source:
        case InstalledText():
            pages = installed.pages(source)
            return (part for domain, page_id, text in pages for part in parts(page_id, domain, [text].__iter__))
        case Hub():
            return _hub_documents(source)
        case Dolma():
            paths = matched_files(source.paths)
            return itertools.chain.from_iterable(read_dolma(path, str(path)) for path in paths)
        case Files():
            return _file_documents(source)


def parts(
    document_id: str, source: str, read: Callable[[], Iterable[str]], split: str | None = None
) -> Iterator[Document]:
    """One document in parts of at most PART_CHARACTERS; none if it is blank.

    Every text and name passes through here and loses what UTF-8 cannot encode.

    Args:
        read: starts to read the text, in chunks of any size; called twice.
        split: the official split.
    """
    if not any(chunk and not chunk.isspace() for chunk in read()):
        return
    first = Document(valid_unicode(document_id), "", valid_unicode(source), split)
    held, size = [], 0
    for chunk in read():
        for start in range(0, len(chunk), PART_CHARACTERS):
            piece = valid_unicode(chunk[start : start + PART_CHARACTERS])
            if size + len(piece) > PART_CHARACTERS:
                yield first._replace(text="".join(held), continues=True)
                held, size = [], 0
            held.append(piece)
            size += len(piece)
    yield first._replace(text="".join(held))


def valid_unicode(text: str) -> str:
    r"""The text without surrogates, which UTF-8 cannot hold: pairs are joined, and lone halves become U+FFFD.

    An escape like \ud800 makes them, or an argument of the command line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def matched_files(patterns: list[str]) -> dict[Path, str]:
    """The files that glob patterns match, each once and with a name, sorted by name.

    Names under relative patterns start at the working directory. Names under absolute patterns, or ones that start at a
    home (`~`), start with the last folder before the first wildcard: with /data/texts/**/*.txt, the name of
    /data/texts/poems/a.txt is texts/poems/a.txt. So a name does not depend on where the text is stored.

    Raises:
        DynarouteError: a pattern is invalid or matches no file.
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
            hint = hint_of_copy(pattern)
            raise DynarouteError(f"paths: {pattern!r} matches no file (seen from {Path.cwd()}){hint}")
        fixed = next(folder for folder in path.parents if not set("*?[") & set(str(folder)))
        start = fixed.parent if path.is_absolute() else Path()
        for file in found:
            names.setdefault(file, file.relative_to(start).as_posix())
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _hub_documents(source: Hub) -> Iterator[Document]:
    for split, rows in _load_hub_dataset(source).items():
        feature = rows.features.get(source.text_column)
        if getattr(feature, "dtype", None) not in ("string", "large_string", "string_view"):
            columns = ", ".join(f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in rows.features.items())
            raise DynarouteError(
                f"text_column: {source.text_column!r} is not a column of text in split {split} of {source.path}, "
                f"which has: {columns}"
            )
        texts = functools.partial(_column, rows.select_columns(source.text_column).with_format("arrow"))
        if source.rows == "joined":
            yield from parts(split, source.path, functools.partial(_joined, texts), split)
        else:
            for index, text in enumerate(texts()):
                yield from parts(f"{split}-{index}", source.path, [text].__iter__, split)


def _column(rows: Any) -> Iterator[str]:
    """The texts of a `datasets.Dataset` with one column: empty where one is missing, U+FFFD for what is not UTF-8."""
    import pyarrow  # takes half a second to import

    for batch in rows.iter(batch_size=100):
        for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            yield (text or b"").decode(errors="replace")


def _joined(texts: Callable[[], Iterator[str]]) -> Iterator[str]:
    for index, text in enumerate(texts()):
        if index:
            yield "\n\n"
        yield text


def _load_hub_dataset(source: Hub) -> Any:
    import datasets  # takes a second to import

    # The cache goes by times of files, which an edit can leave alone.
    mode = "force_redownload" if Path(source.path).is_dir() else None
    try:
        return datasets.load_dataset(source.path, source.name, revision=source.revision, download_mode=mode)
    except Exception as error:  # of any kind: RuntimeError for a loading script, BadZipFile, YAMLError
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        place = ", ".join(part for part in (source.path, source.name, source.revision) if part)
        raise DynarouteError(f"path: dataset {place} cannot be loaded: {reason}") from error


def read_dolma(path: Path, name: str) -> Iterator[Document]:
    """Streams the documents of one compressed file of JSON lines as `parts`; blank lines are skipped.

    Raises:
        DynarouteError: beginning with `name`; a line or the compression is damaged, or the file is empty.
    """
    number = 0
    with path.open("rb") as file:
        try:
            if not file.peek(1):  # gzip reads it as empty text; a power cut can leave such a file
                raise DynarouteError(f"{name}: an empty file, not even a gzip of nothing: fetch the file again")
            with _decompressed(file) as lines:
                for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), start=1):
                    if len(line) > MAX_LINE_BYTES:
                        raise DynarouteError(f"{name}, line {number}: longer than {MAX_LINE_BYTES} bytes: split it up")
                    if not line.isspace():
                        document = parse_document(line, f"{name}, line {number}")
                        yield from parts(document["id"], document["source"], [document["text"]].__iter__)
        except (OSError, EOFError, zlib.error) as error:
            raise DynarouteError(
                f"{name}: damaged gzip or zstd after line {number}: {error}: fetch the file again"
            ) from error


def _decompressed(file: io.BufferedReader) -> BinaryIO:
    """The decompressed content of a file: as zstd if it begins like one, else as gzip."""
    beginning = file.peek(4)[:4]
    if beginning != b"\x28\xb5\x2f\xfd" and beginning[1:] != b"\x2a\x4d\x18":  # or a frame to skip
        return gzip.open(file)
    import pyarrow  # takes half a second to import

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 2**16)


def parse_document(line: str | bytes, place: str) -> dict[str, Any]:
    """The fields of a JSON line {id, text, source, ...}. Raises DynarouteError, naming the place, if it is not one."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # the latter if it is nested a thousand levels deep
        raise DynarouteError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DynarouteError(f"{place}: must be an object with id, text and source, not {type(fields).__name__}")
    for key in ("id", "text", "source"):
        if key not in fields:
            raise DynarouteError(f"{place}: {key} is missing")
        if not isinstance(fields[key], str):
            raise DynarouteError(f"{place}: {key} = {json.dumps(fields[key]):.80}: must be a string")
    return fields


def _file_documents(source: Files) -> Iterator[Document]:
    paths: dict[str, Path] = {}
    for path, name in matched_files(source.paths).items():
        if name in paths:
            raise DynarouteError(f"paths: {paths[name]} and {path} would both be named {name}: move one of them")
        paths[name] = path
    for name, path in paths.items():
        yield from parts(name, path.absolute().parent.name, functools.partial(_read_text, path))


def _read_text(path: Path) -> Iterator[str]:
    """A UTF-8 file in chunks, without a byte-order mark; all line ends become newlines."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while chunk := file.read(PART_CHARACTERS):
                yield chunk
    except UnicodeDecodeError as error:
        raise DynarouteError(f"{path}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
