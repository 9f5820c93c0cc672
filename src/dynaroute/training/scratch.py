"""Where a run keeps what it needs to go on after a stop: outside the outputs, which DVC deletes and checks out."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dynaroute.errors import DynarouteError

PATIENCE = 30.0  # seconds that whoever was asked to leave may take to save


def run_id(identity: dict[str, Any]) -> str:
    """A short hash of everything that a run's result depends on: resolved settings and hashes of inputs."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def scratch_folder(stage: str, run: str) -> Path:
    """`.scratch/<stage>/<run>` under the repository root, also in a queued experiment's copy of the workspace."""
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / stage / run


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the folder for this process: killing DVC alone leaves its stage running a while, and a second may start.

    Raises:
        DynarouteError: another process holds it, and still does after PATIENCE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    with (folder / "lock").open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    holder = lock.read().strip() or "unknown"
                    raise DynarouteError(
                        f"{folder}: process {holder} is already at work with these settings; wait for it, or stop it"
                    ) from error
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


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
