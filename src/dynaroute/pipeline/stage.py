"""Runs a stage script: `--help` from its docstring, validated settings, one-line errors, one instance at a time.

The launcher of training stages is read here, not in the commands of dvc.yaml, where another number of GPUs would mark
finished trainings as changed.
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dynaroute.config import Settings, load_settings
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.environment import check_environment
from dynaroute.pipeline.scratch import PATIENCE, exclusive
from dynaroute.pipeline.terminal import program

LAUNCHED = "DYNAROUTE_LAUNCHED"  # set for processes that `launcher` starts, which must not launch again


def run(main: Callable[..., None], doc: str, *arguments: str, launched: bool = False) -> None:
    """Parses the command line, loads params.yaml and calls `main(settings, *values of the positional arguments)`.

    A missing argument is taken from behind the @ in DVC's stage name, so names from params.yaml never pass through a
    shell. With `launched`, params.yaml's `launcher` replaces this process and starts the script again, unless it is
    `python` or a launcher has started this process. The process ends as `dynaroute.pipeline.terminal.program` says.
    """
    with program(Path(sys.argv[0]).stem):
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        instance = os.environ.get("DVC_STAGE", "").rpartition("@")[2]
        for name in arguments:
            parser.add_argument(name, nargs="?", default=instance)
        values = vars(parser.parse_args()).values()
        if "" in values:
            parser.error(f"{arguments[0]} is missing")
        stage = "_".join(["running", Path(sys.argv[0]).stem, *values]).replace("/", "_")
        # Processes that were not launched together, as by srun alone, would all do the work: the lock stops the others.
        follows = launched and "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"
        settings = load_settings()
        check_environment(settings.device)
        if launched:
            _launch(settings)
        # After a kill of DVC alone its stage runs a while, and a second one may start.
        with contextlib.nullcontext() if follows else exclusive(Path(".scratch") / stage, PATIENCE):
            if "DVC_STAGE" in os.environ:
                _end_with_dvc()
            main(settings, *values)


def _launch(settings: Settings) -> None:
    """Becomes the launcher and keeps the process id, so signals reach it. Raises DynarouteError if it is missing."""
    if settings.launcher == "python" or not os.environ.keys().isdisjoint({LAUNCHED, "RANK"}):  # RANK: by hand
        return
    command = [*shlex.split(settings.launcher), *sys.argv]
    if command[0] == "torchrun":
        command[:1] = [sys.executable, "-m", "dynaroute.pipeline.launcher"]
    try:
        os.execvpe(command[0], command, os.environ | {LAUNCHED: "1"})
    except OSError as error:
        found = f"{command[0]} cannot be run: {error.strerror}"
        raise DynarouteError(f"params.yaml: launcher = {settings.launcher!r}: {found}") from error


def _end_with_dvc() -> None:
    """Sends this process SIGTERM, on which training saves and stops, when the DVC that started it is gone.

    Otherwise it would run on beside the one that the next `dvc repro` starts.
    """
    import psutil

    def first_of_stage() -> psutil.Process:
        """The process that DVC started: this one, or the shell or launcher above it."""
        process = psutil.Process()
        for above in process.parents():
            try:
                if "DVC_STAGE" not in above.environ():
                    break
            except psutil.Error:
                break
            process = above
        return process

    def watch() -> None:
        while first.is_running() and first.ppid() == dvc:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    first = first_of_stage()
    dvc = first.ppid()
    threading.Thread(target=watch, daemon=True).start()
