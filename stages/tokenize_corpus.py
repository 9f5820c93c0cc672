"""Encodes a collected corpus as shards of tokens, with a tokenizer that is trained or fetched first.

    python stages/tokenize_corpus.py docs

Not `tokenize.py`: Python looks into a script's own folder first, so every script here would then import this file
where the standard library means its own module `tokenize`.

Reads   params.yaml (corpora.NAME.tokenizer), data/raw/NAME
Writes  data/tokens/NAME/{train,validation,test}-*.npy, metadata.json, tokenizer/
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.data.tokenization import tokenize
from dynaroute.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the tokens and prints their number."""
    metadata = tokenize(name, settings.corpus(name).tokenizer, Path("data/raw") / name, Path("data/tokens") / name)
    for split, size in metadata["splits"].items():
        characters = size["num_characters"] / max(1, size["num_tokens"])
        print(f"{name} {split}: {size['num_tokens']:,} tokens, {characters:.2f} characters per token")


if __name__ == "__main__":
    run(main, __doc__, "name")
