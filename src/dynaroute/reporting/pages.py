"""Pages from templates.

Whole sentences stand in templates/. Python passes values, tables, and which of a few sentences applies.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dynaroute.reporting.tables import (
    count,
    duration,
    fmt,
    interval,
    listed,
    outcome,
    perplexity,
    pivot,
    published,
    size,
    tabulate,
    unwrap,
)

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,  # a misspelt name is an error, not a gap in a sentence
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)
for one in (count, duration, fmt, interval, listed, outcome, perplexity, pivot, published, size, tabulate):
    ENVIRONMENT.filters[one.__name__] = one


def render(template: str, values: dict[str, Any]) -> str:
    """The text of `templates/<template>` with its values filled in.

    Raises:
        DynarouteError: the template asks for a key that a file of results lacks (see `inputs.Record`).
        jinja2.UndefinedError: it asks for a value that was not passed.
    """
    text = unwrap(ENVIRONMENT.get_template(template).render(values))
    return re.sub(r"\n{3,}", "\n\n", text)  # what a section that was left out leaves
