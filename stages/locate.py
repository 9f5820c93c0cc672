"""Records what a corpus consists of right now: package versions, or files with sizes and times.

    python stages/locate.py docs

It runs on every `dvc repro` in a fraction of a second, and `collect` runs again when what it records has changed.

Reads   params.yaml (corpora.NAME.source)
Writes  data/raw/NAME.source.json
"""

from pathlib import Path

from dynaroute.artifacts import write_json
from dynaroute.config import Settings
from dynaroute.data.corpora import locate
from dynaroute.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the state of the corpus's source."""
    write_json(Path("data/raw") / f"{name}.source.json", locate(settings.corpus(name).source))


if __name__ == "__main__":
    run(main, __doc__, "name")
