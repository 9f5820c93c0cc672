"""Formats Markdown: tables, quotations and numbers with units; most functions are also filters of templates."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NONE = "–"  # not applicable
Format = str | Callable[[Any], str]  # a format specification (",.3f"), the name of a unit, or a function such as `size`
Column = tuple[str, str, Format] | tuple[str, str]  # key, heading, format


def fmt(value: Any, how: Format = "") -> str:
    """One value as text: a string as it is, None and NaN as a dash, a number with separators unless told otherwise."""
    if value is None or value != value:
        return NONE
    if isinstance(value, str):
        return value
    how = {"size": size, "duration": duration, "perplexity": perplexity}.get(how, how)
    return how(value) if callable(how) else format(value, how or ",")


def tabulate(rows: "Iterable[Mapping[str, Any]] | pd.DataFrame", columns: Sequence[Column]) -> str:
    """A Markdown table with a row for each mapping and a cell for each column, formatted by `fmt`.

    Raises:
        KeyError: a row lacks a column's key; a DynarouteError that names the file if the row is an `inputs.Record`.
    """
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    cells = [[fmt(row[key], *how) for key, _, *how in columns] for row in rows]
    return table([heading for _, heading, *_ in columns], cells)


def pivot(frame: "pd.DataFrame", index: Column, columns: str, values: str, how: Format = ".3f") -> str:
    """A Markdown table with a row for each value of a column and a column for each of another, as they first appear."""
    names = list(frame[columns].unique())
    wide = frame.pivot(index=index[0], columns=columns, values=values).loc[frame[index[0]].unique(), names]
    return tabulate(wide.reset_index(), [index, *((name, f"`{name}`", how) for name in names)])


def shared_text(split: Mapping[str, Any]) -> str:
    """The share of a held-out split that training has read in other documents, from the metadata of the tokens."""
    from dynaroute.data.tokens.overlap import SPAN  # slow to import

    share = split.get("share_in_train")
    return "not looked for" if share is None else f"{share:.1%}, in spans of {SPAN} tokens or longer"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    rows = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in rows]
    numeric = [all(_is_numeric(row[column]) for row in rows) for column in range(len(header))]
    rule = ["---:" if right else ":---" for right in numeric]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def outcome(passed: bool | None) -> str:
    """The outcome of a stage's check; None: it measured nothing."""
    return "not measured" if passed is None else "✓" if passed is True else "✗ **failed**"


def published(text: str) -> str:
    """Marks text or tables as published, not measured here: a Markdown quotation that says so first."""
    lines = unwrap(f"**Published.** {text.lstrip()}").splitlines()
    return "\n".join(f"> {line}".rstrip() for line in lines) + "\n" * text.endswith("\n")


def unwrap(text: str) -> str:
    """Markdown with a line for each paragraph and list item, so that a longer number moves no other line."""
    within = r"(?<=[^\s|>])\n {0,3}(?![\s|>#!✓✗-]|\d+\. |```|$)"
    return re.sub(rf"(^```.*?^```)|{within}", lambda match: match[1] or " ", text, flags=re.DOTALL | re.MULTILINE)


def size(num_bytes: float) -> str:
    """Bytes in a suitable binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds in a suitable unit."""
    if seconds < 0.9995:  # or three digits of it are 1e+03
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perplexity(loss: float) -> str:
    """The exponential of a loss in nats, to four digits or the decimal point."""
    if loss > 700:  # near a float's maximum
        return f"e^{loss:,.0f}"
    value = math.exp(loss)
    return f"{value:,.{max(0, 3 - math.floor(math.log10(value)))}f}"


def listed(items: Iterable[Any], word: str = "and") -> str:
    """Items in a sentence: "a, b and c"; a dash if there are none."""
    *others, last = [*map(str, items)] or [NONE]
    return f"{', '.join(others)} {word} {last}" if others else last


def interval(found: Mapping[str, Any] | None, digits: int = 4, sign: str = "+") -> str:
    """An estimate with its interval, "+0.0097 [+0.0046, +0.0148]", from mean, low and high; a dash for None."""
    if found is None:
        return NONE
    mean, low, high = (f"{round(found[part], digits) + 0.0:{sign}.{digits}f}" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"  # + 0.0: no minus before 0


def ratio(value: float, low: float, high: float) -> str:
    """A ratio with its range, "0.62 (0.58–0.67)"."""
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def share(found: Mapping[str, Any] | None) -> str:
    """A share with its interval, "93 % [91 %, 95 %]", from mean, low and high; a dash for None."""
    if found is None:
        return NONE
    mean, low, high = (f"{found[part] * 100:.0f} %" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def count(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 layer", "4 layers"."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _is_numeric(cell: str) -> bool:
    return cell.strip("*")[:1] in {*"0123456789+-−", NONE}
