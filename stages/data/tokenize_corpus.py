"""Encodes a collected corpus as shards of tokens, with a tokenizer that is trained or fetched first.

    python stages/data/tokenize_corpus.py docs

It is not called `tokenize.py`, since scripts in this folder would then import it in place of Python's own `tokenize`.

A corpus of kind dolma_stream is downloaded here, and its text is not kept. A stopped run resumes from
.scratch/tokenize_corpus/.

Reads   params.yaml (corpora.NAME.tokenizer), data/raw/NAME
Writes  data/tokens/NAME/{train,validation,test}-*.npy, metadata.json, tokenizer/
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.config.data import DolmaStream
from dynaroute.data.locate import locate
from dynaroute.data.tokens.encode import tokenize
from dynaroute.data.tokens.stream import tokenize_stream
from dynaroute.pipeline.artifacts import sha256
from dynaroute.pipeline.scratch import exclusive, run_id, scratch_folder
from dynaroute.pipeline.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the tokens and prints their number."""
    corpus, collected, tokens = settings.corpus(name), Path("data/raw") / name, Path("data/tokens") / name
    # First, so that nothing unpinned is fetched from the hub.
    tokenizer = corpus.tokenizer.model_dump() | locate(corpus.tokenizer, f"corpora.{name}.tokenizer")
    if isinstance(corpus.source, DolmaStream):
        identity = {"collected": sha256(collected / "metadata.json"), "tokenizer": tokenizer}
        scratch = scratch_folder("tokenize_corpus", run_id(identity))
        with exclusive(scratch):
            metadata = tokenize_stream(name, corpus, collected, tokens, scratch)
    else:
        metadata = tokenize(name, corpus.tokenizer, collected, tokens)
    for split, size in metadata["splits"].items():
        characters = size["num_characters"] / max(1, size["num_tokens"])
        print(f"{name} {split}: {size['num_tokens']:,} tokens, {characters:.2f} characters per token")


if __name__ == "__main__":
    run(main, __doc__, "name")
