"""Markdown: tables, quotations and numbers with units; most of it also serves templates as filters."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

NONE = "–"  # in place of a value that does not exist
Format = str | Callable[[Any], str]  # a format specification (",.3f"), or a function such as `size`
Column = tuple[str, str, Format] | tuple[str, str]  # key, heading, format


def fmt(value: Any, how: Format = "") -> str:
    """One value as text: a string as it is, None and NaN as a dash, a number with separators unless told otherwise."""
    if value is None or value != value:
        return NONE
    if isinstance(value, str):
        return value
    if callable(how):
        return how(value)
    return format(value, how or ",")


def tabulate(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """A Markdown table with a row for each mapping and a cell for each column, formatted by `fmt`.

    Raises:
        KeyError: a row lacks a column's key; a DynarouteError that names the file if the row is an `inputs.Record`.
    """
    cells = [[fmt(row[key], *how) for key, _, *how in columns] for row in rows]
    return table([heading for _, heading, *_ in columns], cells)


def shared_text(split: Mapping[str, Any]) -> str:
    """How much of a held-out split training has read in other documents, from the metadata of the tokens."""
    from dynaroute.data.tokens.overlap import SPAN  # it is slow to import

    share = split.get("share_in_train")
    return "not looked for" if share is None else f"{share:.1%}, in spans of {SPAN} tokens or longer"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns that hold numbers are aligned to the right."""
    rows = [list(row) for row in rows]
    numeric = [all(_is_numeric(row[column]) for row in rows) for column in range(len(header))]
    rule = ["---:" if right else ":---" for right in numeric]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def outcome(passed: bool | None) -> str:
    """What a check of a stage found; None where it measured nothing."""
    return "not measured" if passed is None else "✓" if passed is True else "✗ **failed**"


def published(text: str) -> str:
    """Marks text, a table included, as published and not measured here: a Markdown quotation that says so first."""
    return "\n".join(f"> {line}".rstrip() for line in f"**Published.** {text}".splitlines())


def figure(path: str, caption: str) -> str:
    """An image by its path relative to the report, with its caption below."""
    return f"![{caption}]({path})\n\n*{caption}*"


def size(num_bytes: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds, or the unit that suits few or many of them."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perplexity(loss: float) -> str:
    """The exponential of a loss in nats, to four digits or the decimal point."""
    if loss > 700:  # more than a float holds
        return f"e^{loss:,.0f}"
    value = math.exp(loss)
    return f"{value:,.{max(0, 3 - math.floor(math.log10(value)))}f}"


def listed(items: Iterable[Any], word: str = "and") -> str:
    """Items in a sentence: "a, b and c"; a dash if there are none."""
    *others, last = [*map(str, items)] or [NONE]
    return f"{', '.join(others)} {word} {last}" if others else last


def count(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 layer", "4 layers"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _is_numeric(cell: str) -> bool:
    return cell.strip("*")[:1] in {*"0123456789+-−", NONE}
