"""How the tests of reports run stages and read pages."""

import os
import re
import subprocess
import sys

from repository import REPOSITORY, stage_script

from dynaroute.pipeline.artifacts import sha256

STRANGE = re.compile(r"7,?777,?777|8888\.[89]")


def run_stage(name: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a stage in the working directory."""
    command = [sys.executable, str(stage_script(name))]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def hashes(*paths: str) -> dict[str, str]:
    """SHA-256 of files."""
    return {path: sha256(path) for path in paths}


def table_rows(text: str) -> list[list[str]]:
    """The cells of all tables of a text, their headings and rules included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def strange(value):
    """The value with every number in it made one that `STRANGE` finds and nothing else is."""
    if isinstance(value, dict):
        return {key: strange(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strange(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return 7_777_777 if isinstance(value, int) else 8888.888 + value / 1e6


def unmarked(text: str) -> str:
    """A page without what it marks as published: quotations, and columns whose heading says so."""
    kept, marked_columns = [], set()
    for line in text.splitlines():
        if line.startswith(">"):
            continue
        cells = line.split("|")
        if not line.startswith("|"):
            marked_columns = set()
        elif not marked_columns:
            marked_columns = {index for index, cell in enumerate(cells) if "published" in cell}
        kept.append("|".join(cell for index, cell in enumerate(cells) if index not in marked_columns))
    return "\n".join(kept)


def assert_readable(text: str, words: int) -> None:
    """A page has no placeholder, at most so many words of prose, and no table larger than a screen."""
    assert not re.search(r"\bnan\b|None|\{|\}|\bTrue\b|\bFalse\b|Undefined|\n\n\n", text)
    assert len(re.sub(r"^[|>!#].*$", "", text, flags=re.MULTILINE).split()) <= words
    assert max(table.count("\n") for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)) <= 32
    assert max(map(len, table_rows(text))) <= 10  # columns
