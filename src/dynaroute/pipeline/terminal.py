"""How programs start others, and end in one line when the user, the disk or the reader of their output is at fault."""

import contextlib
import errno
import io
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dynaroute.errors import DynarouteError

# Errors outside of any program: a full or failing disk, and files without write permission.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
CLOSED_PIPE = 128 + signal.SIGPIPE  # the status that a shell gives to a program that the signal ended


@contextlib.contextmanager
def program(name: str) -> Iterator[None]:
    """Runs a program in its block. Characters that stdout cannot encode are printed as question marks.

    When the user or the disk is at fault, the process ends with status 1 and one line on stderr. When the reader of
    stdout or stderr has closed it, as `head` does, it ends with status 141 and prints nothing.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed before the start: `print(file=None)` would print to the other one
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    status: str | int | None = None
    try:
        yield
    except SystemExit as end:
        status = end.code
    except DynarouteError as error:
        status = f"{name}: {error}"
    except SafetensorError as error:  # from writing; readers catch their own
        status = f"{name}: cannot write: {error}"
    except OSError as error:
        if error.errno == errno.EPIPE and _a_reader_is_gone():
            status = CLOSED_PIPE
        elif error.errno in DISK_ERRORS:
            status = f"{name}: {f'{error.filename}: ' if error.filename else ''}{error.strerror}"
        else:
            raise
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # Python flushes once more at exit, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = status or (CLOSED_PIPE if error.errno == errno.EPIPE else f"{name}: stdout: {error.strerror}")
    if status:
        sys.exit(status)


def output_of(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; its messages are shown. Raises DynarouteError if it fails."""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DynarouteError(f"{' '.join(command)} failed with status {done.returncode}: {done.stdout.strip()}")
    return done.stdout.strip()


def _a_reader_is_gone() -> bool:
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
