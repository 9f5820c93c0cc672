"""Encodes a collected corpus as shards of tokens, with a tokenizer that is trained or fetched first.

    python stages/data/tokenize_corpus.py docs

Not `tokenize.py`: Python looks into a script's own folder first, so every script here would then import this file
where the standard library means its own module `tokenize`.

A corpus of kind dolma_stream is downloaded here, and its text not kept; a run that was stopped goes on from where it
was, in .scratch/tokenize_corpus/.

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
    # First, since what is not here is not asked of the hub.
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
