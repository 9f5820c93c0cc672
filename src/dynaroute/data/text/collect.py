"""A corpus as files: its documents, split once and for all into training, validation and test."""

import contextlib
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dynaroute.config import Corpus, HeldOut, Region, Split
from dynaroute.data.text.sources import Document, documents, parse_document
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, write_json

SPLITS = ("train", "validation", "test")


def collect(name: str, corpus: Corpus, directory: str | Path) -> dict[str, Any]:
    """Writes {train,validation,test}.jsonl, a line {id, text, source} each document, and metadata.json.

    Splits by shares hold an id's document in the same split whatever else the corpus contains. Memory does not grow
    with the text: it holds one document, and 8 bytes for every id.

    Returns:
        The metadata: per split, documents and characters, in all and by source.

    Raises:
        DynarouteError: two documents share an id, or a split that should hold something is empty.
    """
    counts = {split: {"documents": Counter(), "characters": Counter()} for split in SPLITS}
    hashes = array("Q")
    seen_splits = Counter()
    with output_directory(directory) as folder:
        with contextlib.ExitStack() as stack:
            files = {
                split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n"))
                for split in SPLITS
            }
            for document in tqdm(documents(corpus.source), desc=f"collect {name}", unit=" documents", disable=None):
                hashes.append(stable_hash(document.id))
                seen_splits[document.split] += 1
                split = document.split
                if corpus.split != "official":
                    split = split_of(hashes[-1], len(hashes) - 1, corpus.split)
                if split not in files:
                    continue  # an official split of some other name, such as "unsupervised"
                line = {"id": document.id, "text": document.text, "source": document.source}
                files[split].write(json.dumps(line, ensure_ascii=False) + "\n")
                counts[split]["documents"][document.source] += 1
                counts[split]["characters"][document.source] += len(document.text)
        _refuse_duplicates(name, corpus, hashes)
        found = {split: counts[split]["documents"].total() for split in SPLITS}
        refuse_unfilled_splits(name, corpus.split, found, seen_splits)
        metadata = {"corpus": name, "splits": {split: _summary(counts[split]) for split in SPLITS}}
        write_json(folder / "metadata.json", metadata)
    return metadata


def read_documents(path: str | Path) -> Iterator[Document]:
    """Streams the documents of a .jsonl file that `collect` wrote.

    Raises:
        DynarouteError: the file is missing, or a line of it is damaged.
    """
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield parse_document(line, f"{path}, line {number}")
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage collect") from error


def stable_hash(document_id: str) -> int:
    """64 bits that depend on the id alone: not on the process, the machine or the other documents."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "big")


def split_of(id_hash: int, number: int, split: Split | Region) -> str:
    """The split of a document.

    Args:
        id_hash: `stable_hash` of its id. It decides with shares: [0, 1) is test, then validation, then train.
        number: its place in the corpus, from 0. It decides with a region.
        split: what is held out.
    """
    if isinstance(split, Region):
        if not split.skip <= number < split.skip + split.validation + split.test:
            return "train"
        return "validation" if number < split.skip + split.validation else "test"
    position = (id_hash >> 11) / 2**53  # the 53 bits that a float holds exactly, so never 1.0
    if position < split.test:
        return "test"
    return "validation" if position < split.test + split.validation else "train"


def _refuse_duplicates(name: str, corpus: Corpus, hashes: array) -> None:
    """Refuses a corpus that holds an id twice: most often the same file under two names, so the text counts twice."""
    ordered = np.sort(np.frombuffer(hashes, np.uint64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    for document in documents(corpus.source):  # once more, to tell the ids and whether only their hashes are equal
        if stable_hash(document.id) in repeated:
            if document.id in seen:
                raise DynarouteError(f"corpora.{name}: the id {document.id!r} occurs twice: ids must be unique")
            seen.add(document.id)


def refuse_unfilled_splits(name: str, split: HeldOut, found: dict[str, int], names: Iterable[str] = ()) -> None:
    """Refuses a corpus without a document in a split that should hold some, or that ends within its region.

    Args:
        name: of the corpus.
        split: what should be held out.
        found: documents by split.
        names: of its official splits.

    Raises:
        DynarouteError: naming the split.
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
