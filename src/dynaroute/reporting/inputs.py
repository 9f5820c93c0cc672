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


def read_csv(path: str | Path, columns: list[str], names: list[str] | None = None) -> "pd.DataFrame":
    """Reads CSV. Raises DynarouteError unless every row has numbers in all `columns` and values in all `names`."""
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
        if not pd.api.types.is_numeric_dtype(table[name]) or table[name].isna().any():
            raise DynarouteError(f"{path}: column {name!r} must hold a number in every row: {REMEDY}")
    for name in names or []:
        if name not in table or table[name].isna().any():
            raise DynarouteError(f"{path}: column {name!r} must be there and filled in every row: {REMEDY}")
    return table


def check_same_run(expected: str, *records: Record) -> None:
    """Refuses results of different runs. Raises DynarouteError, naming the file that belongs to another run."""
    for record in records:
        if record["run"] != expected:
            raise DynarouteError(f"{record.path}: belongs to run {record['run']}, not {expected}: run dvc repro")


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
