"""How the tests of reports change what stages wrote, and read pages."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dynaroute.config import read_yaml
from dynaroute.pipeline.artifacts import write_json

STRANGE = re.compile(r"7,?777,?777|8888\.[89]")


def edit_json(path: str | Path, change: Callable[[dict], object]) -> None:
    """Lets `change` alter what a JSON file holds."""
    data = json.loads(Path(path).read_text())
    change(data)
    write_json(path, data)


def edit_csv(path: str | Path, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> None:
    """Lets `change` alter what a CSV file holds, or return something else."""
    table = pd.read_csv(path)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)


def edit_yaml(path: str | Path, change: Callable[[dict], object]) -> None:
    """Lets `change` alter what a YAML file holds."""
    data = read_yaml(path)
    change(data)
    Path(path).write_text(json.dumps(data))  # JSON is YAML


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
