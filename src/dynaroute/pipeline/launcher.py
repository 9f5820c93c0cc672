"""torchrun without its traceback when a process that it started fails: that process has said why, in one line."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"torchrun: the process of rank {rank} ended with status {failure.exitcode}")
    except SignalException as error:
        sys.exit(f"torchrun: stopped by {error.sigval.name}")
