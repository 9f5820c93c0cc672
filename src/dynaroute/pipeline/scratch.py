"""Where a run keeps what it needs to go on after a stop: outside the outputs, which DVC deletes and checks out."""

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

PATIENCE = 30.0  # seconds that whoever was asked to leave may take to save
POLL = 0.2  # seconds between two looks at whether another process has let go


def run_id(identity: dict[str, Any]) -> str:
    """A short hash of everything that a run's result depends on: resolved settings and hashes of inputs."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def scratch_folder(stage: str, run: str) -> Path:
    """`.scratch/<stage>/<run>` under the repository root, also in a queued experiment's copy of the workspace."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / stage / run


def hint_of_copy(path: str) -> str:
    """The end of an error about a missing path or pattern, where only an experiment's copy of the workspace lacks it.

    Such copies lie in .dvc/tmp/exps, and hold what git tracks.
    """
    root, first = Path(os.environ.get("DVC_ROOT", ".")).resolve(), re.split(r"/?[^/]*[*?[]", path)[0]
    if ".dvc" not in os.path.relpath(Path.cwd(), root) or not (first and (root / first).exists()):
        return ""
    return f": `dvc exp run --temp` and `--queue` copy only what git tracks: add --copy-paths {shlex.quote(first)}"


@contextlib.contextmanager
def exclusive(
    folder: Path, patience: float = math.inf, while_waiting: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Holds the folder, which is made if need be, for this process; waits while another one does, and says for whom.

    Args:
        folder: what to hold; its holder may remove it with `discard`.
        patience: seconds that the other one may take.
        while_waiting: called again and again.

    Raises:
        DynarouteError: another process holds it, and still does after `patience` seconds.
    """
    started, said = time.monotonic(), False
    while (lock := _take(folder)) is None:
        with contextlib.suppress(FileNotFoundError):  # the other one has just discarded it
            holder = (folder / "lock").read_text().strip()  # empty until it has had the time to write it
            if time.monotonic() - started > patience:
                raise DynarouteError(
                    f"{folder}: process {holder} is already at work with these settings; wait for it, or stop it"
                )
            if holder and not said:
                waiting = f"{folder}: process {holder} is at work with these settings: waiting for it"
                tqdm.write(waiting, file=sys.stderr)
                said = True
        while_waiting()
        time.sleep(POLL)
    with lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _take(folder: Path) -> TextIO | None:
    """The locked lock file of a folder; None where another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError, BlockingIOError):
        lock = stack.enter_context((folder / "lock").open("a+"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What was opened before its holder discarded it holds nothing.
        if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
            stack.pop_all()
            return lock
    return None


def discard(folder: Path) -> None:
    """Removes a folder that this process holds, at once: another one may be waiting, and makes it anew."""
    gone = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    folder.replace(gone)
    shutil.rmtree(gone)


class StopRequest:
    """Notes SIGTERM and SIGINT while active, so that the loop can save and leave at the end of a step."""

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
