"""Collects a corpus into files, its documents split once and for all into training, validation and test."""

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynaroute.config.data import Corpus, HeldOut, Region, Split
from dynaroute.data.text.sources import Document, documents, parse_document
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, write_json

SPLITS = ("train", "validation", "test")


def collect(name: str, corpus: Corpus, directory: str | Path) -> dict[str, Any]:
    """Writes {train,validation,test}.jsonl, one line {id, text, source} per document, and metadata.json.

    A long document is several consecutive lines, all but the last with "continues": true. Of documents with the same id
    and source, the first is kept. With shares, an id's split does not depend on the rest of the corpus. Memory holds a
    part of one document, and some 100 bytes for every id.

    Returns:
        The metadata: for each split, documents and characters, in all and by source; and the number of duplicates.

    Raises:
        DynarouteError: a split that should hold something is empty.
    """
    counts = {split: {"documents": Counter(), "characters": Counter()} for split in SPLITS}
    official_splits, duplicates, seen = Counter(), 0, set()
    starts = True  # whether the next part begins a document
    with output_directory(directory) as folder, contextlib.ExitStack() as stack:
        files = {
            split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n"))
            for split in SPLITS
        }
        for part in tqdm(documents(corpus.source), desc=f"collect {name}", unit=" parts", disable=None):
            if starts:
                key = hashlib.blake2b(f"{part.source}\0{part.id}".encode(), digest_size=16).digest()
                split = None
                if key in seen:
                    duplicates += 1
                else:
                    split = part.split
                    official_splits[split] += 1
                    if corpus.split != "official":
                        split = split_of(stable_hash(part.id), len(seen), corpus.split)
                    seen.add(key)
            starts = not part.continues
            if split not in files:
                continue  # a duplicate, or an official split with another name, such as "unsupervised"
            line = {"id": part.id, "text": part.text, "source": part.source}
            if part.continues:
                line["continues"] = True
            files[split].write(json.dumps(line, ensure_ascii=False) + "\n")
            counts[split]["documents"][part.source] += not part.continues
            counts[split]["characters"][part.source] += len(part.text)
        found = {split: counts[split]["documents"].total() for split in SPLITS}
        refuse_unfilled_splits(name, corpus.split, found, official_splits)
        summaries = {split: _summary(counts[split]) for split in SPLITS}
        metadata = {"corpus": name, "duplicates": duplicates, "splits": summaries}
        write_json(folder / "metadata.json", metadata)
    if duplicates:
        print(f"collect {name}: {duplicates:,} documents left out: id and source occurred before", file=sys.stderr)
    return metadata


def read_documents(path: str | Path, expected: int | None = None) -> Iterator[Document]:
    """Streams the documents of a .jsonl file that `collect` wrote, long ones in parts.

    Raises:
        DynarouteError: the file is missing, a line is damaged, or there are not as many documents as expected.
    """
    found = 0
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                fields = parse_document(line, f"{path}, line {number}")
                yield Document(fields["id"], fields["text"], fields["source"], continues=fields.get("continues", False))
                found += not fields.get("continues")
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage collect") from error
    if expected not in (None, found):
        raise DynarouteError(
            f"{path}: {found} documents, but metadata.json says {expected}: run the stage collect again"
        )


def stable_hash(document_id: str) -> int:
    """64 bits that depend on the id alone, not on the process, the machine or the other documents."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big")


def split_of(id_hash: int, number: int, split: Split | Region) -> str:
    """The split of a document: by the `stable_hash` of its id with shares, by its number from 0 with a region."""
    if isinstance(split, Region):
        if not split.skip <= number < split.skip + split.validation + split.test:
            return "train"
        return "validation" if number < split.skip + split.validation else "test"
    # [0, 1) is test, then validation, then train. A float holds 53 bits exactly, so the position is below 1.
    position = (id_hash >> 11) / 2**53
    if position < split.test:
        return "test"
    return "validation" if position < split.test + split.validation else "train"


def refuse_unfilled_splits(name: str, split: HeldOut, found: dict[str, int], names: Iterable[str] = ()) -> None:
    """Raises DynarouteError if a split that should hold documents is empty, or the corpus ends within its region.

    Args:
        split: what should be held out.
        found: documents by split.
        names: of official splits.
    """
    for part in SPLITS:
        wanted = None if split == "official" or part == "train" else getattr(split, part)
        if wanted == 0 or found[part] >= (wanted if wanted is not None and isinstance(split, Region) else 1):
            continue
        if split == "official":
            has = ", ".join(names) or "nothing"
            raise DynarouteError(f"corpora.{name}: no official split {part!r} with text in it; there is: {has}")
        drawn = "" if wanted is None else f" at split.{part} = {wanted}"
        raise DynarouteError(
            f"corpora.{name}: {found[part] or 'none'} of the {sum(found.values())} documents fell to {part}{drawn}: "
            "the corpus needs more documents or other shares"
        )


def _summary(counts: dict[str, Counter]) -> dict[str, Any]:
    sources = sorted(counts["documents"])
    return {
        **{unit: count.total() for unit, count in counts.items()},
        "sources": {source: {unit: count[source] for unit, count in counts.items()} for source in sources},
    }
