"""Reads every kind of source in params.yaml as one stream of documents; `collect.py` splits and writes it."""

import codecs
import functools
import gzip
import hashlib
import io
import itertools
import json
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dynaroute.config.data import Dolma, Files, Hub, InstalledText, Source
from dynaroute.data.text import installed
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.scratch import hint_of_copy

PART_CHARACTERS = 2**18  # of a document in memory at once
MAX_LINE_BYTES = (
    2**28
)  # of a Dolma file; a line is in memory as a whole, and longer ones are mostly files without lines


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
            return _dolma_documents(source)
        case Files():
            return _file_documents(source)


def parts(
    document_id: str, source: str, read: Callable[[], Iterable[str]], split: str | None = None
) -> Iterator[Document]:
    """One document in parts of at most PART_CHARACTERS; none if it is blank.

    Every text and name passes through here and loses what UTF-8 cannot encode; distinct names stay distinct.

    Args:
        read: starts to read the text, in chunks of any size; called twice.
        split: the official split.
    """
    if not any(chunk and not chunk.isspace() for chunk in read()):
        return
    first = Document(_valid_name(document_id), "", _valid_name(source), split)
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


def _valid_name(name: str) -> str:
    """The name repaired; if it had to be, or U+FFFD is in it, with a hash, since other names may look the same."""
    valid = valid_unicode(name)
    if valid == name and "\ufffd" not in name:
        return name
    return f"{valid}#{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"


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
                yield from parts(f"{split}-{index}", source.path, functools.partial(_decoded, text), split)


def _column(rows: Any) -> Iterator[memoryview]:
    """The values of a `datasets.Dataset` with one text column, not copied; a missing value is empty."""
    import pyarrow  # takes half a second to import

    for batch in rows.iter(batch_size=1000):  # much faster than row by row
        for text in batch.column(0).cast(pyarrow.large_binary()):
            yield memoryview(text.as_buffer() or b"")


def _joined(texts: Callable[[], Iterator[memoryview]]) -> Iterator[str]:
    for index, text in enumerate(texts()):
        if index:
            yield "\n\n"
        yield from _decoded(text)


def _decoded(text: memoryview) -> Iterator[str]:
    """A text in chunks; bytes that are not UTF-8, which `datasets` does not look for, become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for start in range(0, len(text), PART_CHARACTERS):
        yield decoder.decode(text[start : start + PART_CHARACTERS])
    yield decoder.decode(b"", final=True)


def dataset_files(folder: Path) -> list[Path]:
    """The files of a local dataset, but for hidden ones, which are of tools."""
    found = (path for path in sorted(folder.rglob("*")) if "/." not in f"/{path.relative_to(folder)}")
    return [path for path in found if path.is_file()]


def _load_hub_dataset(source: Hub) -> Any:
    import datasets  # takes a second to import

    try:
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        mode = None
        if (folder := Path(source.path)).is_dir():
            mode = "force_redownload"  # the cache goes by times of files, which an edit can leave alone
            own = {path.resolve() for path in dataset_files(folder)}
            for file in itertools.chain(*builder.config.data_files.values()):
                if Path(file.rpartition("::")[2]).resolve() not in own:
                    raise ValueError(f"{file} is hidden or not in the folder, so that nobody would notice its edits")
        builder.download_and_prepare(download_mode=mode)
        return builder.as_dataset()
    except Exception as error:  # of any kind: RuntimeError for a loading script, BadZipFile, YAMLError
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
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
    """Streams the documents of one compressed file of JSON lines as `parts`; blank lines are skipped.

    Raises:
        DynarouteError: beginning with `name`; a line or the compression is damaged, or the file is empty.
    """
    number = 0
    try:
        if not file.read(1):  # gzip reads it as empty text; a power cut can leave such a file
            raise DynarouteError(f"{name}: an empty file, not even a gzip of nothing: fetch the file again")
        with decompressed(file) as lines:
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


def decompressed(file: BinaryIO) -> BinaryIO:
    """The decompressed content of a file, from its start: as zstd if it begins like one, else as gzip.

    Reading it raises OSError, EOFError or zlib.error if the file is damaged. Closing it does not close `file`.
    """
    file.seek(0)
    beginning = file.read(4)
    file.seek(0)
    if not is_zstd(beginning):
        return gzip.open(file)
    import pyarrow  # takes half a second to import

    source = pyarrow.PythonFile(types.SimpleNamespace(read=file.read, close=lambda: None, closed=False), "r")
    return io.BufferedReader(pyarrow.CompressedInputStream(source, "zstd"), 2**16)


def is_zstd(beginning: bytes) -> bool:
    """Whether the first four bytes are those of a zstd frame, or of a skippable frame, with which some files begin."""
    return beginning == b"\x28\xb5\x2f\xfd" or beginning[1:] == b"\x2a\x4d\x18"


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
    decoder, size = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(PART_CHARACTERS):
                size += len(chunk)
                yield decoder.decode(chunk)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # in the last chunk
        raise DynarouteError(f"{path}: not UTF-8 text at byte {size - len(error.object) + error.start}") from error
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
