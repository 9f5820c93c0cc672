"""What train_dwr has left: the best model, and how much each expert was used."""

import csv
from pathlib import Path

from pydantic import ValidationError

from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record
from dynaroute.training.checkpoints import load_checkpoint, load_weights


def load_trained(folder: Path) -> tuple[DWRTransformer, str]:
    """The best checkpoint as a model, and the run that it is from.

    Raises:
        DynarouteError: a file of the training is missing or damaged.
    """
    record = read_record(folder / "run.json")
    try:
        config, identifier = DWRConfig.model_validate(record["config"]), record["run"]
    except (KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DynarouteError(f"{folder / 'run.json'}: damaged: {reason}: run the stage train_dwr again") from error
    model = DWRTransformer(config).eval()
    tensors, _ = load_checkpoint(folder / "best.safetensors")
    load_weights(model, tensors, folder / "best.safetensors")
    return model, identifier


def read_expert_load(path: Path, config: DWRConfig) -> list[list[float]]:
    """Each expert's share of its layer's assignments, [L][E], from the router report of the training.

    Raises:
        DynarouteError: the report is missing, or not of a model of this size.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            load = {(int(row["layer"]), int(row["expert"])): float(row["load"]) for row in csv.DictReader(file)}
        return [[load[layer, expert] for expert in range(config.num_experts)] for layer in range(config.num_layers)]
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage train_dwr") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DynarouteError(f"{path}: no load of {error}: run the stage train_dwr again") from error
