"""What test_two_processes.py runs on two processes: python -m torch.distributed.run ... two_processes.py FOLDER"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

from small_training import LOCALITY, InterruptedInAValidation, Objective, make_dwr_trainer, train

from dynaroute.errors import DynarouteError
from dynaroute.training import loop

RANK = int(os.environ["RANK"])


def train_dwr(folder):
    """Trains DWR; each process notes the tokens of each expert in each of its forward passes, [pass][layer][expert]."""
    passes = []
    trainer = make_dwr_trainer(folder / "both")
    model = trainer.unwrapped

    def note(module, _, output):
        if module.training:
            passes.append([layer.counts.tolist() for layer in output.router])

    model.register_forward_hook(note)
    with trainer:
        trainer.run()
    (folder / f"passes{RANK}.json").write_text(json.dumps(passes))
    with make_dwr_trainer(folder / "both_loss_free", **LOCALITY) as trainer:
        trainer.run()


def interrupt(step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


class InterruptedWhileSaving(Objective):
    """By a signal that comes after the processes agreed to go on."""

    def __init__(self):
        super().__init__()
        save_checkpoint = loop.save_checkpoint

        def interrupted(path, tensors, state):
            save_checkpoint(path, tensors, state)
            if state["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                loop.save_checkpoint = save_checkpoint

        loop.save_checkpoint = interrupted


def stop(folder):
    """Stops runs by a signal to one of the processes; each notes what it says. Then lets them go on, but for one."""
    train(folder / "whole", micro_batch_size=2)
    for name, interrupted, rank in (
        ("step0", lambda: Objective(interrupt), 0),
        ("step1", lambda: Objective(interrupt), 1),
        ("validation0", InterruptedInAValidation, 0),
        ("validation1", InterruptedInAValidation, 1),
        ("saving0", InterruptedWhileSaving, 0),  # it is the main process that saves
    ):
        try:
            train(folder / name, interrupted() if rank == RANK else Objective(), micro_batch_size=2)
        except DynarouteError as error:
            (folder / f"{name}-said-by-{RANK}").write_text(str(error))
        train(folder / name, micro_batch_size=2)
    with contextlib.suppress(DynarouteError):
        train(folder / "left", Objective(interrupt), dropout=0.0, micro_batch_size=2)


def wait(folder):
    """Trains where another run is at work at first, for which the main process alone looks."""
    exclusive = loop.exclusive

    def held_at_first(scratch, while_waiting):
        for _ in range(3):
            while_waiting()
        return exclusive(scratch)

    loop.exclusive = held_at_first
    train(folder / "waited", micro_batch_size=2)
    loop.exclusive = exclusive


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # a process whose other one has left waits for ever
    train_dwr(Path(sys.argv[1]))
    stop(Path(sys.argv[1]))
    wait(Path(sys.argv[1]))
