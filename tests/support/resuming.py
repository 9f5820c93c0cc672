"""For tests of what is killed and resumed."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def killed_at(owner: object, name: str, call: int = 0) -> Iterator[None]:
    """Ends its block, as a kill would, where `owner.name` is called for the time `call`, which counts from 0."""
    original, calls = getattr(owner, name), itertools.count()

    def kill(*arguments: object, **options: object) -> object:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, kill)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder and below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
