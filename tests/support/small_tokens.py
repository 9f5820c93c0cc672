"""A tokenized corpus of given tokens, in files as the stage tokenize_corpus leaves them."""

from collections.abc import Sequence
from pathlib import Path

from dynaroute.data.tokens.shard_writer import SHARD_TOKENS, ShardWriter, padded, token_dtype
from dynaroute.pipeline.artifacts import write_json


def write_tokens(
    folder: Path,
    vocab_size: int,
    eot_id: int = 0,
    sources: Sequence[str] = ("docs",),
    shard_tokens: int = SHARD_TOKENS,
    **splits: list[list[int]],
) -> Path:
    """Writes the documents of each split, which come from the sources in turn; three characters a token."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"vocab_size": vocab_size, "padded_vocab_size": padded(vocab_size), "eot_id": eot_id}
    metadata |= {"dtype": token_dtype(vocab_size), "sources": list(sources), "splits": {}}
    for split, documents in splits.items():
        writer = ShardWriter(folder, split, {source: n for n, source in enumerate(sources)}, vocab_size, shard_tokens)
        for index, ids in enumerate(documents):
            writer.write(ids, sources[index % len(sources)], num_characters=3 * len(ids))
        metadata["splits"][split] = writer.close()
    write_json(folder / "metadata.json", metadata)
    return folder
