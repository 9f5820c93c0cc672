"""Tokenizes a corpus at published addresses while it downloads it; its text is never kept.

Files keep the order of their list and documents the order of their lines, whatever arrives first, so tokens depend on
the files alone. A killed run resumes after the last file that it finished; what it wrote later is dropped.
"""

import contextlib
import re
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynaroute.config.data import Corpus, DolmaStream
from dynaroute.data.text.collect import SPLITS, refuse_unfilled_splits, split_of, stable_hash
from dynaroute.data.text.download import fetch
from dynaroute.data.text.sources import read_dolma
from dynaroute.data.tokens.encode import describe, encoded, in_order
from dynaroute.data.tokens.shard_writer import SHARD_TOKENS, ShardWriter, SplitState
from dynaroute.data.tokens.tokenizers import load_tokenizer, save_tokenizer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import move_directory, output_directory, read_record, sha256, write_json
from dynaroute.pipeline.scratch import discard

DOWNLOADS = 5  # files being downloaded or waiting: at most so many are on disk, compressed


def list_addresses(name: str, corpus: Corpus, directory: str | Path) -> dict[str, Any]:
    """Writes and returns metadata.json: the addresses of a corpus, in order, and what is held out of it.

    Raises:
        DynarouteError: the list cannot be read, is too short, or has a line that is no address or occurs twice.
    """
    source: DolmaStream = corpus.source
    place = f"corpora.{name}.source.addresses: {source.addresses} of {source.path}"
    try:
        file = Path(source.path, source.addresses)
        if not Path(source.path).is_dir():
            from huggingface_hub import hf_hub_download  # takes a second

            file = Path(hf_hub_download(source.path, source.addresses, repo_type="dataset", revision=source.revision))
        lines = file.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of them
        raise DynarouteError(f"{place} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error
    addresses = [line.strip() for line in lines if line.strip()]
    if len(addresses) < (source.files or 1):
        raise DynarouteError(f"{place} has {len(addresses)} lines, fewer than files = {source.files or 1}")
    addresses = addresses[: source.files]
    for number, address in enumerate(addresses):
        if not re.fullmatch(r"https?://[^\s/]+/\S+", address):
            raise DynarouteError(f"{place}: {address!r} is no http or https address")
        if address in addresses[:number]:
            raise DynarouteError(f"{place}: {address} occurs twice: its text would count twice")
    metadata = {"corpus": name, "split": corpus.split.model_dump(), "addresses": addresses}
    with output_directory(directory) as folder:
        write_json(folder / "metadata.json", metadata)
    return metadata


@dataclass
class Progress:
    """The resume state of a run, besides the tokens themselves."""

    files: list[dict[str, Any]] = field(default_factory=list)  # address, bytes, sha256, documents of each finished one
    documents: int = 0  # read in all
    sources: dict[str, int] = field(default_factory=dict)  # numbers of sources, in order
    splits: dict[str, SplitState | None] = field(default_factory=lambda: dict.fromkeys(SPLITS))

    @classmethod
    def read(cls, path: Path) -> "Progress":
        """The last note; a fresh start if there is none."""
        if not path.exists():
            return cls()
        data = read_record(path)
        data |= {"splits": {split: SplitState(*state) for split, state in data["splits"].items()}}
        data |= {"sources": {source: number for number, source in enumerate(data["sources"])}}
        return cls(**data)


def tokenize_stream(
    name: str,
    corpus: Corpus,
    collected: str | Path,
    directory: str | Path,
    scratch: str | Path,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenizes the files that `list_addresses` listed in `collected` into `directory`, a folder for `TokenShards`.

    The run lives in `scratch` until it is done, and resumes there. Neither its memory nor its disk space, apart from
    the tokens, grows with the corpus.

    Returns:
        The metadata of the folder: as `tokenize` writes it, and what was read from every address.

    Raises:
        DynarouteError: a file cannot be fetched or is damaged; or the corpus ends before its held-out region.
    """
    addresses = read_record(Path(collected) / "metadata.json")["addresses"]
    scratch = Path(scratch)
    folder, downloads, note = scratch / "tokens", scratch / "downloads", scratch / "progress.json"
    if not folder.is_dir():
        note.unlink(missing_ok=True)
    run = Progress.read(note)
    if not note.exists():
        save_tokenizer(corpus.tokenizer, iter(()), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    writers = {
        split: ShardWriter(folder, split, run.sources, tokenizer.vocab_size, shard_tokens, run.splits[split])
        for split in SPLITS
    }
    downloads.mkdir(exist_ok=True)
    stop = threading.Event()

    def download(number: int) -> Path:
        path = downloads / f"{number:06d}"
        fetch(addresses[number], path, stop)
        return path

    left = range(len(run.files), len(addresses))
    bar = tqdm(total=len(addresses), initial=left.start, desc=f"tokenize {name}", unit="file", disable=None)
    with bar, contextlib.closing(in_order(download, left, DOWNLOADS)) as paths:
        try:
            for number, path in zip(left, paths, strict=True):
                address, documents_before = addresses[number], run.documents
                try:
                    for piece, ids in encoded(tokenizer, read_dolma(path, address)):
                        split = split_of(stable_hash(piece.id), run.documents, corpus.split)
                        writers[split].write(ids, piece.source, len(piece.text), piece.continues)
                        run.documents += not piece.continues
                except DynarouteError:
                    path.unlink()  # so that the same command fetches it again
                    raise
                file = {"address": address, "bytes": path.stat().st_size, "sha256": sha256(path)}
                run.files.append(file | {"documents": run.documents - documents_before})
                run.splits = {split: writer.flush() for split, writer in writers.items()}
                write_json(note, vars(run))
                path.unlink()
                sizes = f"{run.documents:,} documents, {sum(w.num_tokens for w in writers.values()):,} tokens"
                bar.write(f"{name}: {number + 1} of {len(addresses)} files, {sizes}", file=sys.stderr)
                bar.update()
        finally:
            stop.set()

    metadata = describe(name, corpus.tokenizer, tokenizer)
    splits = {split: writer.close() for split, writer in writers.items()}
    refuse_unfilled_splits(name, corpus.split, {split: own["num_documents"] for split, own in splits.items()})
    metadata |= {"sources": list(run.sources), "splits": splits, "files": run.files}
    write_json(folder / "metadata.json", metadata)
    move_directory(folder, directory)
    discard(scratch)
    return metadata
