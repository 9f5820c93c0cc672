"""A collected corpus to a folder of tokens: makes its tokenizer and encodes every split."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dynaroute.config import GPT2, ByteBPE, HubTokenizer
from dynaroute.data.text.collect import SPLITS, read_documents
from dynaroute.data.text.sources import Document
from dynaroute.data.tokens.overlap import shared_shares
from dynaroute.data.tokens.parallel import in_order
from dynaroute.data.tokens.shard_writer import SHARD_TOKENS, ShardWriter, padded, token_dtype
from dynaroute.data.tokens.tokenizers import Tokenizer, save_tokenizer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, read_record, write_json

BATCH_CHARACTERS = 2**21  # enough to keep all cores busy, and some 100 MB while the tokens are Python objects
BATCHES_AHEAD = 3  # so that no core waits for the last document of a batch


def tokenize(
    name: str,
    settings: ByteBPE | GPT2 | HubTokenizer,
    collected: str | Path,
    directory: str | Path,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes the tokens of a corpus that `collect` wrote to `collected` as a folder for `TokenShards`.

    Memory does not grow with the corpus, except for what training a BPE needs.

    Returns:
        The metadata of the folder. Held-out splits have a `share_in_train`, see `shared_shares`.

    Raises:
        DynarouteError: a file is missing or damaged, or the tokenizer cannot be made.
    """
    collected = Path(collected)
    raw = read_record(collected / "metadata.json")["splits"]
    sources = sorted({source for split in SPLITS for source in raw[split]["sources"]})
    with output_directory(directory) as folder:
        training_texts = (document.text for document in read_documents(collected / "train.jsonl"))
        tokenizer = save_tokenizer(settings, training_texts, folder / "tokenizer")
        metadata = describe(name, settings, tokenizer) | {"sources": sources, "splits": {}}
        total = sum(raw[split]["characters"] for split in SPLITS)
        with tqdm(total=total, desc=f"tokenize {name}", unit="char", unit_scale=True, disable=None) as progress:
            for split in SPLITS:
                writer = ShardWriter(folder, split, sources, tokenizer.vocab_size, shard_tokens)
                for document, ids in encoded(tokenizer, read_documents(collected / f"{split}.jsonl")):
                    writer.write(ids, document.source, len(document.text))
                    progress.update(len(document.text))
                own = metadata["splits"][split] = writer.close()
                if own["num_documents"] != raw[split]["documents"]:
                    raise DynarouteError(
                        f"{collected / f'{split}.jsonl'}: {own['num_documents']} documents, but metadata.json says "
                        f"{raw[split]['documents']}: run the stage collect again"
                    )
        write_json(folder / "metadata.json", metadata)
        for split, share in shared_shares(folder, SPLITS[1:]).items():
            metadata["splits"][split]["share_in_train"] = share
        write_json(folder / "metadata.json", metadata)
    return metadata


def describe(name: str, settings: ByteBPE | GPT2 | HubTokenizer, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the metadata of a folder of tokens says of its tokenizer."""
    return {
        "corpus": name,
        "tokenizer": settings.model_dump(),
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": padded(tokenizer.vocab_size),
        "eot_id": tokenizer.eot_id,
        "dtype": token_dtype(tokenizer.vocab_size),
    }


def encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with their tokens, end-of-text included, in order; some are encoded on all cores as others are read."""

    def encode(batch: list[Document]) -> list[tuple[Document, np.ndarray]]:
        ids = tokenizer.encode_batch([document.text for document in batch])
        return [(document, np.append(own, tokenizer.eot_id)) for document, own in zip(batch, ids, strict=True)]

    with contextlib.closing(in_order(encode, _batches(documents), BATCHES_AHEAD)) as batches:
        for batch in batches:
            yield from batch


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
