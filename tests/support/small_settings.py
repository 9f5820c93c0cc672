"""The settings of params.yaml, with other values where a test needs them."""

import functools
from typing import TypeVar

from repository import REPOSITORY

from dynaroute.config import Settings, load_settings
from dynaroute.config.schema import Section

Changed = TypeVar("Changed", bound=Section)


def changed(section: Changed, **changes: object) -> Changed:
    """A copy with other values, which are not validated; a dictionary changes keys of the section of that name."""
    own = {name: getattr(section, name) for name in changes}
    return section.model_copy(
        update={
            name: changed(own[name], **value) if isinstance(own[name], Section) and isinstance(value, dict) else value
            for name, value in changes.items()
        }
    )


def default_settings(**changes: object) -> Settings:
    """The default settings on one thread, with other values."""
    return changed(_load(), **{"num_threads": 1, **changes})


@functools.cache
def _load() -> Settings:
    return load_settings(REPOSITORY / "params.yaml")
