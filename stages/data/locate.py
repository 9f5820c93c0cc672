"""Records what stages depend on besides results and settings: their code, and what params.yaml names elsewhere.

    python stages/data/locate.py

It runs on every `dvc repro`, and whatever depends on a file that has changed runs again.

Reads   params.yaml, the scripts and modules of this repository, and what corpora, tokenizers, bases and encoders name
Writes  data/inputs/code/<script>.json   the hash of the syntax tree of a script, and of each module that it imports
        data/inputs/<key>.json           for each section of params.yaml that may name packages or files: versions or
                                         hashes, or `refused` with the reason
        data/inputs/scales.json          by scale, the primary questions that `make scale` copied to reports/<scale>/
"""

import csv
import json
from pathlib import Path
from typing import Any

from dynaroute.config import Settings
from dynaroute.data.locate import locate, sections
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.closure import SOURCES, closures
from dynaroute.pipeline.stage import run

INPUTS = Path("data/inputs")


def main(settings: Settings) -> None:
    """Writes a file for each script and each section."""
    scripts = [path for folder in ("stages", "benchmarks") for path in (SOURCES.parent / folder).rglob("*.py")]
    for name, modules in closures(scripts, Path(".scratch/locate/trees.json")).items():
        write(INPUTS / "code" / f"{name}.json", modules)
    pages = sorted(Path("reports").glob("*/dagformer/primary.csv"))
    pages = [path for path in pages if path.parts[1] != "smoke"]  # which learns nothing
    write(INPUTS / "scales.json", {path.parts[1]: list(csv.DictReader(path.open(encoding="utf-8"))) for path in pages})
    named = {key: section for corpus in settings.corpora for key, section in sections(settings, corpus).items()}
    for key, section in named.items():
        try:
            found = locate(section, key)
        except DynarouteError as error:  # reported by a stage that needs the section
            found = {"refused": str(error)}
        write(INPUTS / f"{key}.json", found)


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON without forcing it to disk: DVC removes it before the next run of this stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    run(main, __doc__)
