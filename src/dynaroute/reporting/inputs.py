"""Reads results of stages for reports, with errors that name the file."""

from pathlib import Path
from typing import TYPE_CHECKING

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import REMEDY, Record
from dynaroute.pipeline.artifacts import read_record as read_record

if TYPE_CHECKING:
    import pandas as pd  # imported where tables are read: it is slow to import


def read_checkpoint(path: str | Path) -> tuple[Record, Record]:
    """Tensors and state of a checkpoint. Raises DynarouteError if it is damaged, later on access to a missing key."""
    from dynaroute.training.checkpoints import load_checkpoint  # torch is slow to import

    tensors, state = load_checkpoint(path)
    return Record(tensors, path), Record(state, path)


def read_csv(path: str | Path, *columns: str) -> "pd.DataFrame":
    """Reads CSV. Raises DynarouteError if the file is missing or damaged, has no rows or lacks one of `columns`."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # pandas' parser errors, and bytes that are not UTF-8
        raise DynarouteError(f"{path}: damaged, not valid CSV ({str(error).strip()}): {REMEDY}") from error
    if table.empty:
        raise DynarouteError(f"{path}: has no rows: {REMEDY}")
    for name in columns:
        if name not in table:
            raise DynarouteError(f"{path}: lacks the column {name!r}: {REMEDY}")
    return table


def read_benchmark(name: str) -> Record | None:
    """Reads the results of a benchmark, which the default pipeline does not run; None if there are none.

    Raises:
        DynarouteError: the file is damaged.
    """
    path = Path("reports/benchmarks") / f"{name}.json"
    return read_record(path) if path.exists() else None


def file_size(path: str | Path) -> int:
    """Bytes of a file. Raises DynarouteError if there is none."""
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: {REMEDY}") from error
