"""Runs a launcher of training, such as torchrun, without its traceback when a process that it started fails.

    python -m dynaroute.pipeline.launcher /path/to/torchrun --standalone --nproc_per_node 4 stages/dwr/train_dwr.py

That process explains the problem in one line, which a traceback of the launcher's own code would hide.
"""

import runpy
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Runs the launcher that the command line names, with the arguments after it; exits with its status."""
    del sys.argv[0]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except subprocess.CalledProcessError as error:  # of accelerate, with one process
        sys.exit(f"{Path(sys.argv[0]).name}: the process that it started ended with status {error.returncode}")
    except Exception as error:
        # By name: importing torch takes seconds, and the launcher may be another one.
        if type(error).__name__ == "ChildFailedError":
            rank, failure = error.get_first_failure()
            sys.exit(f"{Path(sys.argv[0]).name}: the process of rank {rank} ended with status {failure.exitcode}")
        if type(error).__name__ == "SignalException":
            sys.exit(f"{Path(sys.argv[0]).name}: stopped by {error.sigval.name}")
        raise


if __name__ == "__main__":
    main()
