"""Tokenizes a collected corpus: makes its tokenizer and encodes every split on all cores."""

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from dynaroute.config.data import GPT2, ByteBPE, HubTokenizer
from dynaroute.data.text.collect import SPLITS, read_documents
from dynaroute.data.text.sources import Document
from dynaroute.data.tokens.cuts import GPT2_CUTS, last_cut
from dynaroute.data.tokens.overlap import shared_shares
from dynaroute.data.tokens.shard_writer import SHARD_TOKENS, ShardWriter, padded, token_dtype
from dynaroute.data.tokens.tokenizers import Tokenizer, save_tokenizer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, read_record, write_json

BATCH_CHARACTERS = 2**21  # enough to keep all cores busy, and some 100 MB while the tokens are Python objects
BATCHES_AHEAD = 3  # so that no core waits for the last document of a batch
MAX_UNCUT = 2**22  # characters that a tokenizer may have to read at once: about half a gigabyte
Item, Result = TypeVar("Item"), TypeVar("Result")


def tokenize(
    name: str,
    settings: ByteBPE | GPT2 | HubTokenizer,
    collected: str | Path,
    directory: str | Path,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenizes a corpus that `collect` wrote to `collected` into `directory`, a folder for `TokenShards`.

    Memory grows neither with the corpus nor with a document, except for the distinct words that train a BPE.

    Returns:
        The metadata of the folder. Held-out splits have a `share_in_train`, see `shared_shares`.

    Raises:
        DynarouteError: a file is missing or damaged, the tokenizer cannot be made, or see `pieces`.
    """
    collected = Path(collected)
    raw = read_record(collected / "metadata.json")["splits"]
    names = sorted({source for split in SPLITS for source in raw[split]["sources"]})
    sources = {source: number for number, source in enumerate(names)}
    with output_directory(directory) as folder:
        read = {split: (collected / f"{split}.jsonl", raw[split]["documents"]) for split in SPLITS}
        training_texts = (piece.text for piece in pieces(read_documents(*read["train"]), GPT2_CUTS))
        tokenizer = save_tokenizer(settings, training_texts, folder / "tokenizer")
        metadata = describe(name, settings, tokenizer) | {"sources": names, "splits": {}}
        total = sum(raw[split]["characters"] for split in SPLITS)
        with tqdm(total=total, desc=f"tokenize {name}", unit="char", unit_scale=True, disable=None) as progress:
            for split in SPLITS:
                writer = ShardWriter(folder, split, sources, tokenizer.vocab_size, shard_tokens)
                for document, ids in encoded(tokenizer, read_documents(*read[split])):
                    writer.write(ids, document.source, len(document.text), document.continues)
                    progress.update(len(document.text))
                metadata["splits"][split] = writer.close()
        write_json(folder / "metadata.json", metadata)
        for split, share in shared_shares(folder, SPLITS[1:]).items():
            metadata["splits"][split]["share_in_train"] = share
        write_json(folder / "metadata.json", metadata)
    return metadata


def describe(name: str, settings: ByteBPE | GPT2 | HubTokenizer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of a token folder's metadata that describes its tokenizer."""
    return {
        "corpus": name,
        "tokenizer": settings.model_dump(),
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": padded(tokenizer.vocab_size),
        "eot_id": tokenizer.eot_id,
        "dtype": token_dtype(tokenizer.vocab_size),
    }


def encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
    """The `pieces` of documents with their tokens, in order, encoded on all cores while the next ones are read.

    An end-of-text token follows the last piece of each document.
    """

    def encode(batch: list[Document]) -> list[tuple[Document, np.ndarray]]:
        try:
            ids = tokenizer.encode_batch([piece.text for piece in batch])
        except Exception as error:  # the libraries raise nothing more precise
            raise DynarouteError(
                f"document {_first_failing(batch, tokenizer).id!r}: cannot be encoded: {error}"
            ) from error
        return [
            (piece, own if piece.continues else np.append(own, tokenizer.eot_id))
            for piece, own in zip(batch, ids, strict=True)
        ]

    with contextlib.closing(in_order(encode, _batches(pieces(documents, tokenizer.cuts)), BATCHES_AHEAD)) as batches:
        for batch in batches:
            yield from batch


def pieces(documents: Iterable[Document], cuts: re.Pattern[str] | None) -> Iterator[Document]:
    """The same documents, split into parts only where `cuts` allows it.

    Raises:
        DynarouteError: naming the document of which more than MAX_UNCUT characters would be one piece.
    """
    rest = ""
    for document in documents:
        text, rest = rest + document.text, ""
        if document.continues:
            cut = last_cut(text, cuts) if cuts else 0
            text, rest = text[:cut], text[cut:]
        if len(rest) > MAX_UNCUT:
            raise DynarouteError(
                f"document {document.id!r} of {document.source!r}: this tokenizer has to read more than "
                f"{MAX_UNCUT:,} characters of it at once: split it up"
            )
        if text:
            yield document._replace(text=text)


def _first_failing(batch: list[Document], tokenizer: Tokenizer) -> Document:
    for piece in batch:
        try:
            tokenizer.encode_batch([piece.text])
        except Exception:
            return piece
    return batch[0]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents until their texts reach BATCH_CHARACTERS."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yields `function(item)` of each item, in order; at most `threads` items are started and not yet yielded.

    Draws `items` on the caller's thread while the others compute. Close it if you leave it early.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
