"""Records what a corpus consists of right now: package versions, or files with sizes and times.

    python stages/data/locate.py docs

It runs on every `dvc repro` in a fraction of a second, and `collect` runs again when what it records has changed.

Reads   params.yaml (corpora.NAME; dagformer.base and dagformer.encoder where dagformer.corpus is NAME)
Writes  data/raw/NAME.source.json
"""

from pathlib import Path

from dynaroute.config import Hosted, Settings
from dynaroute.data.text.sources import locate
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the state of the corpus's source, unless what is on the hub has no revision."""
    corpus = settings.corpus(name)
    used = {f"corpora.{name}.source": corpus.source, f"corpora.{name}.tokenizer": corpus.tokenizer}
    if name == settings.dagformer.corpus:  # now, and not after days of downloads
        used |= {"dagformer.base": settings.dagformer.base, "dagformer.encoder": settings.dagformer.encoder}
    for key, section in used.items():
        if isinstance(section, Hosted):
            section.refuse_unpinned(key)
    write_json(Path("data/raw") / f"{name}.source.json", locate(corpus.source))


if __name__ == "__main__":
    run(main, __doc__, "name")
