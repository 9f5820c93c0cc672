"""Prose is plain: no word of a list to avoid, and no sentence of more than 35 words.

Read are the README, docs, templates of pages, docstrings and the comments of settings; not code, tables and headings.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import REPOSITORY

LONGEST = 35  # words
AVOID = {  # what the field does not say: what it says
    r"go(es|ing)? on from|went on from": "resume from",
    r"mak(e|es|ing) way|made way": "evict",
    r"foretell\w*|foresee\w*|foretold|foresaw": "predict",
    r"mend(s|ed|ing)?": "repair, fix",
    r"in the light of": "conflicts with",
    r"is not shown to|no difference shown": "no detectable difference",
    r"utili[sz]e\w*|leverag\w+": "use",
    r"in order to": "to",
    r"very|really|basically|simply|obviously|clearly": "(nothing)",
    r"note that|it should be noted": "(nothing)",
    r"come(s)? on top of": "be added to",
    r"foremost|wherein|whereby|thereof|therein|hereby|hitherto|lest": "a plainer word",
}
FILES = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/*.md"),
    *REPOSITORY.glob("src/dynaroute/reporting/templates/*"),
]
SCRIPTS = [path for folder in ("src", "stages", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")]


def paragraphs(text: str) -> Iterator[str]:
    """The prose of Markdown, a paragraph or list item each; code and what a template fills in count as one word."""
    text = re.sub(r"^```.*?^```|\{%.*?%\}|\{#.*?#\}", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{\{.*?\}\}|`[^`\n]+`|!\[.*?\]\(.*?\)", "X", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#)", line)]
    yield from re.split(r"\n\s*\n|\n\s*(?=(?:[-*>]|\d+\.)\s)", "\n".join(lines))


def docstrings(source: str) -> Iterator[str]:
    """The prose of docstrings, a paragraph or entry each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            text = re.sub(r"`[^`]+`", "X", text)
            text = re.sub(r"^.*\S {2,}\S.*$", "\n", text, flags=re.MULTILINE)  # formulas and lists in columns
            yield from re.split(r"\n\s*\n|\n(?=\s*[\w\[\]*, ]+: )|;\s", text)


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?:])[*_\")]*\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("path", [*FILES, *SCRIPTS], ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_prose_is_plain(path: Path):
    read = docstrings if path.suffix == ".py" else paragraphs
    found = [sentence for paragraph in read(path.read_text("utf-8")) for sentence in sentences(paragraph)]
    long = [f"{len(one.split())} words: {one}" for one in found if len(one.split()) > LONGEST]
    avoided = [
        f"not {match[0]!r} but {better}: {one}"
        for one in found
        for words, better in AVOID.items()
        for match in re.finditer(rf"\b(?:{words})\b", one, re.IGNORECASE)
    ]
    assert not [*long, *avoided]
