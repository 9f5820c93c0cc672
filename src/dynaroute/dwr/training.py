"""A DWR model, what it is trained on and with what: the same whichever stage trains it."""

from pathlib import Path
from typing import Any

import torch

from dynaroute.artifacts import sha256
from dynaroute.config import DWR, Settings
from dynaroute.data.shards import TokenShards, Windows
from dynaroute.data.windows import Selection
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.dwr.objective import DWRObjective
from dynaroute.training.loop import Trainer, make_accelerator, steps_in_epochs
from dynaroute.training.scratch import run_id, scratch_folder


def open_tokens(corpus: str) -> dict[str, TokenShards]:
    """The splits train, validation and test of a tokenized corpus, by name.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    return {split: TokenShards(Path("data/tokens") / corpus, split) for split in ("train", "validation", "test")}


def make_trainer(
    settings: Settings,
    dwr: DWR,
    shards: TokenShards,
    training: Windows | Selection,
    validation: Windows | Selection,
    stage: str,
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a new model, and all that its result depends on.

    Args:
        settings: seed, device and threads.
        dwr: the model and its training.
        shards: the training split, whose vocabulary the model has.
        training: windows of it.
        validation: windows that decide which weights are best.
        stage: that trains, and has the scratch folder.

    Raises:
        DynarouteError: the device is not there, or the training does not fit the windows and processes.
    """
    sizes = dwr.model_dump(include=set(DWRConfig.model_fields) - {"vocab_size"})
    config = DWRConfig(vocab_size=shards.padded_vocab_size, **sizes)
    accelerator = make_accelerator(settings.device, dwr.training.precision)
    identity = {
        "dwr": dwr.model_dump(),
        "seed": settings.seed,
        "device": settings.device,
        "num_threads": settings.num_threads,
        "tokens": sha256(shards.directory / "metadata.json"),
        "num_processes": accelerator.num_processes,  # floats are added in another order
    }
    torch.manual_seed(settings.seed)
    trainer = Trainer(
        DWRTransformer(config),
        DWRObjective(config, dwr.balance_coefficient),
        training,
        validation,
        dwr.training,
        total_steps=steps_in_epochs(dwr.training, len(training)),
        accelerator=accelerator,
        seed=settings.seed,
        scratch=scratch_folder(stage, run_id(identity)),
    )
    return trainer, identity
