"""The files of a variant: its settings as `resolve_variants` wrote them, and its training's result, read back."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynaroute.config.dagformer import BASES, Variant
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record
from dynaroute.training.checkpoints import load_checkpoint, load_weights


def read_variant(folder: Path, name: str) -> tuple[str, Variant]:
    """What a variant starts from, a base or another variant, and its settings.

    Raises:
        DynarouteError: its file in `folder` is missing or damaged.
    """
    path = folder / f"{name}.yaml"
    knobs = read_record(path)
    try:
        return knobs.pop("from"), Variant.model_validate(knobs)
    except (KeyError, ValidationError) as error:
        raise DynarouteError(f"{path}: not the settings of a variant: run resolve_variants again") from error


def chain(folder: Path, start: str) -> list[str]:
    """What a variant starts from, and what that one starts from, back to their base.

    Raises:
        DynarouteError: the file of a variant before this one is missing or damaged.
    """
    found = [start]
    while found[-1] not in BASES:
        found.append(read_variant(folder, found[-1])[0])
    return found


def seed_of(folder: Path, start: str, variant: Variant) -> int:
    """The seed of data order and noise: a different one for each variant of a `chain`, whose errors it raises."""
    return variant.seed + 1_000_003 * (len(chain(folder, start)) - 1)


def load_predictor(folder: Path, device: str) -> tuple[dict[str, Any], StructurePredictor]:
    """The record of a variant's training, and its trained predictor.

    Raises:
        DynarouteError: a file is missing or damaged, or the files belong to different runs.
    """
    path, weights = folder / "run.json", folder / "predictor.safetensors"
    record = read_record(path)
    tensors, state = load_checkpoint(weights)
    try:
        variant = Variant.model_validate(record["knobs"])
        sizes = [record[key] for key in ("num_layers", "num_heads", "embedding_size")]
        runs = {record["run"], state["run"]}
        record["identity"]["base"]
    except (KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DynarouteError(f"{path}: damaged: {reason}: run the stage train_dagformer again") from error
    if len(runs) > 1:
        raise DynarouteError(f"{folder}: files of two runs, {' and '.join(sorted(runs))}: train the variant again")
    predictor = StructurePredictor(variant, *sizes)
    load_weights(predictor, tensors, weights)
    return record, predictor.requires_grad_(False).eval().to(device)


def load_graph(trained: Path, name: str, base: str, variant: Variant, device: str) -> DagForward:
    """The base that a variant wires: its own if it was trained jointly, else the one that it shares with others.

    Args:
        trained: the folder that holds the bases and a folder for each variant.
        name: the variant's.
        base: `base` or `planted`, from the record of its training.
        variant: its settings.
        device: cpu or cuda.

    Raises:
        DynarouteError: the base is missing or damaged.
    """
    folder = trained / (f"{name}/base" if variant.base_lr > 0 else base)
    return DagForward(load_base(folder, device), variant.input_norm)
