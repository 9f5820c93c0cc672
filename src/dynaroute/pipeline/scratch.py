"""Scratch folders, where runs keep their resume state: outside the outputs, which DVC deletes and checks out."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tqdm import tqdm

from dynaroute.errors import DynarouteError

PATIENCE = 30.0  # seconds that a process may take to save after it was asked to stop
POLL = 0.2  # seconds between two attempts to take a lock


def run_id(identity: dict[str, Any]) -> str:
    """A short hash of all that a run's result depends on: resolved settings and hashes of inputs."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def scratch_folder(stage: str, run: str) -> Path:
    """`.scratch/<stage>/<run>` under the repository root, also in a queued experiment's copy of the workspace."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / stage / run


def hint_of_copy(path: str) -> str:
    """The end of an error message about a path that only an experiment's copy of the workspace lacks; else empty.

    Such copies are in .dvc/tmp/exps, and hold what git tracks.
    """
    root, first = Path(os.environ.get("DVC_ROOT", ".")).resolve(), re.split(r"/?[^/]*[*?[]", path)[0]
    if ".dvc" not in os.path.relpath(Path.cwd(), root) or not (first and (root / first).exists()):
        return ""
    return f": `dvc exp run --temp` and `--queue` copy only what git tracks: add --copy-paths {shlex.quote(first)}"


@contextlib.contextmanager
def exclusive(
    folder: Path, patience: float = math.inf, while_waiting: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Locks a folder for this process, and makes it if needed. Waits while another process has it, and names that one.

    Args:
        folder: its holder may remove it with `discard`.
        patience: seconds to wait.
        while_waiting: called at every attempt.

    Raises:
        DynarouteError: another process still holds it after `patience` seconds.
    """
    started, said = time.monotonic(), False
    while (lock := _take(folder)) is None:
        with contextlib.suppress(FileNotFoundError):  # its holder has just discarded it
            holder = (folder / "lock").read_text().strip()  # empty until the holder has written it
            if time.monotonic() - started > patience:
                raise DynarouteError(
                    f"{folder}: process {holder} is already at work with these settings; wait for it, or stop it"
                )
            if holder and not said:
                tqdm.write(
                    f"{folder}: process {holder} is at work with these settings: waiting for it", file=sys.stderr
                )
                said = True
        while_waiting()
        time.sleep(POLL)
    with lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _take(folder: Path) -> TextIO | None:
    """The locked lock file of a folder; None if another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError, BlockingIOError):
        lock = stack.enter_context((folder / "lock").open("a+"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # If the holder discarded the folder after the file was opened, the lock is worth nothing.
        if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
            stack.pop_all()
            return lock
    return None


def discard(folder: Path) -> None:
    """Removes a folder that this process holds in one step: a waiting process may make it anew."""
    gone = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    folder.replace(gone)
    shutil.rmtree(gone)


class StopRequest:
    """Records SIGTERM and SIGINT while active, so that a loop can save and stop after a step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
