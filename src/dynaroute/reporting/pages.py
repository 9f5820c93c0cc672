"""Renders pages from templates/, which hold the sentences. Python passes values, tables and choices."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dynaroute.reporting import tables

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,  # a misspelt name is an error, not a gap
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)
for name in ("count", "duration", "fmt", "interval", "listed", "outcome", "perplexity", "pivot", "published", "size",
             "tabulate"):  # fmt: skip
    ENVIRONMENT.filters[name] = getattr(tables, name)


def render(template: str, values: dict[str, Any]) -> str:
    """The text of `templates/<template>` with its values filled in.

    Raises:
        DynarouteError: the template uses a key that a file of results lacks (see `inputs.Record`).
        jinja2.UndefinedError: it uses a value that was not passed.
    """
    text = tables.unwrap(ENVIRONMENT.get_template(template).render(values))
    return re.sub(r"\n{3,}", "\n\n", text)  # left by sections that were omitted
