"""Reads the documents of a corpus and splits them into training, validation and test.

    python stages/data/collect.py docs

A corpus of kind dolma_stream is read when it is tokenized; for it, only the addresses are listed.

First it refuses anything missing or not pinned to a revision that the corpus names, or DAGFormer if it trains on it.

Reads   params.yaml (corpora.NAME; dagformer.base and dagformer.encoder where dagformer.corpus is NAME)
Writes  data/raw/NAME/{train,validation,test}.jsonl, metadata.json; or metadata.json alone, with the addresses
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.config.data import DolmaStream
from dynaroute.data.locate import locate, sections
from dynaroute.data.text.collect import collect
from dynaroute.data.tokens.stream import list_addresses
from dynaroute.pipeline.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the splits and prints their sizes, or lists what is to be read."""
    for key, section in sections(settings, name).items():  # now rather than after days of downloads
        locate(section, key)
    corpus, folder = settings.corpus(name), Path("data/raw") / name
    if isinstance(corpus.source, DolmaStream):
        print(f"{name}: {len(list_addresses(name, corpus, folder)['addresses']):,} files to read")
        return
    metadata = collect(name, corpus, folder)
    for split, size in metadata["splits"].items():
        print(f"{name} {split}: {size['documents']:,} documents, {size['characters']:,} characters")


if __name__ == "__main__":
    run(main, __doc__, "name")
