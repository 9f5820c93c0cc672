"""A collected corpus to a folder of tokens: makes its tokenizer and encodes every split."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynaroute.artifacts import output_directory, read_json, write_json
from dynaroute.config import GPT2, ByteBPE, HubTokenizer
from dynaroute.data.collection import SPLITS, read_documents
from dynaroute.data.corpora import Document
from dynaroute.data.shards import SHARD_TOKENS, ShardWriter, padded, token_dtype
from dynaroute.data.tokenizers import save_tokenizer
from dynaroute.errors import DynarouteError

BATCH_CHARACTERS = 2**21  # enough to keep all cores busy, and some 100 MB while the tokens are Python objects


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
        The metadata of the folder.

    Raises:
        DynarouteError: a file is missing or damaged, or the tokenizer cannot be made.
    """
    collected = Path(collected)
    raw = read_json(collected / "metadata.json")["splits"]
    sources = sorted({source for split in SPLITS for source in raw[split]["sources"]})
    with output_directory(directory) as folder:
        training_texts = (document.text for document in read_documents(collected / "train.jsonl"))
        tokenizer = save_tokenizer(settings, training_texts, folder / "tokenizer")
        metadata = {
            "corpus": name,
            "tokenizer": settings.model_dump(),
            "vocab_size": tokenizer.vocab_size,
            "padded_vocab_size": padded(tokenizer.vocab_size),
            "eot_id": tokenizer.eot_id,
            "dtype": token_dtype(tokenizer.vocab_size),
            "sources": sources,
            "splits": {},
        }
        total = sum(raw[split]["characters"] for split in SPLITS)
        with tqdm(total=total, desc=f"tokenize {name}", unit="char", unit_scale=True, disable=None) as progress:
            for split in SPLITS:
                writer = ShardWriter(folder, split, sources, tokenizer.vocab_size, shard_tokens)
                for batch in _batches(read_documents(collected / f"{split}.jsonl")):
                    encoded = tokenizer.encode_batch([document.text for document in batch])
                    for document, ids in zip(batch, encoded, strict=True):
                        ids.append(tokenizer.eot_id)
                        writer.write(ids, document.source, len(document.text))
                        progress.update(len(document.text))
                own = metadata["splits"][split] = writer.close()
                if own["num_documents"] != raw[split]["documents"]:
                    raise DynarouteError(
                        f"{collected / f'{split}.jsonl'}: {own['num_documents']} documents, but metadata.json says "
                        f"{raw[split]['documents']}: run the stage collect again"
                    )
        write_json(folder / "metadata.json", metadata)
    return metadata


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
