"""Trains one DWR run of `dwr_runs`, and measures it: losses, gate norms, and hit rates at a third of its experts.

    python stages/dwr/train_dwr_run.py reference

Reads   data/dwr/runs/<name>.yaml, data/tokens/<corpus of the run>
Writes  data/dwr/run_results/<name>.json  what was found; weights are not kept

A run that was stopped resumes from its last checkpoint in .scratch/train_dwr_run/.
"""

import functools
from pathlib import Path

import torch
from pydantic import ValidationError

from dynaroute.analysis.dwr_runs import train_and_measure
from dynaroute.config import Settings
from dynaroute.config.dwr import DWRRun
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.stage import run

RESULTS = Path("data/dwr/run_results")


def main(settings: Settings, name: str) -> None:
    """Reads the knobs of the run, trains and measures it, and writes the result."""
    torch.set_num_threads(settings.num_threads)
    train_and_measure(settings, name, read_run(name), functools.partial(write_json, RESULTS / f"{name}.json"))


def read_run(name: str) -> DWRRun:
    """All knobs of a run, as resolve_variants wrote them.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    path = Path("data/dwr/runs") / f"{name}.yaml"
    try:
        return DWRRun.model_validate(read_record(path))
    except ValidationError as error:
        raise DynarouteError(f"{path}: not the knobs of a run: run resolve_variants again") from error


if __name__ == "__main__":
    run(main, __doc__, "name", launched=True)
