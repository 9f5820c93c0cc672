"""Reads the documents of a corpus and splits them into training, validation and test.

    python stages/collect.py docs

Reads   params.yaml (corpora.NAME.source, corpora.NAME.split), data/raw/NAME.source.json (by DVC alone)
Writes  data/raw/NAME/{train,validation,test}.jsonl, metadata.json
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.data.collection import collect
from dynaroute.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the splits and prints their sizes."""
    metadata = collect(name, settings.corpus(name), Path("data/raw") / name)
    for split, size in metadata["splits"].items():
        print(f"{name} {split}: {size['documents']:,} documents, {size['characters']:,} characters")


if __name__ == "__main__":
    run(main, __doc__, "name")
