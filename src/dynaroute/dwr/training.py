"""A DWR model, what it is trained on and with what: the same whichever stage trains it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dynaroute.config import Settings
from dynaroute.config.dwr import DWR
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.dwr.objective import DWRObjective
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256
from dynaroute.pipeline.scratch import run_id, scratch_folder
from dynaroute.training.loop import Trainer, steps_in_epochs


def other_windows(corpus: str, trained: TokenShards, seq_len: int) -> Windows:
    """All of the training split of a corpus that is not trained on.

    Raises:
        DynarouteError: its tokens are missing, damaged, or another tokenizer's than those that are trained on.
    """
    shards = TokenShards(Path("data/tokens") / corpus, "train")
    folders = (split.directory / "tokenizer" for split in (shards, trained))
    own, expected = ([sha256(path) for path in sorted(folder.glob("*"))] for folder in folders)
    if own != expected:
        raise DynarouteError(
            f"params.yaml: dwr.also_validate_on = {corpus!r}: its tokenizer is not that of {trained.directory.name}"
        )
    return Windows(shards, seq_len, keep_tail=True)


def make_trainer(
    settings: Settings,
    dwr: DWR,
    accelerator: Accelerator,
    shards: TokenShards,
    training: WindowSet,
    validation: WindowSet,
    stage: str,
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a new model, and all that its result depends on.

    Args:
        settings: seed, device and threads.
        dwr: the model and its training.
        accelerator: of `dwr.training.precision`.
        shards: the training split, whose vocabulary the model has.
        training: windows of it.
        validation: windows that decide which weights are best.
        stage: that trains, and has the scratch folder.

    Raises:
        DynarouteError: the training does not fit the windows and processes; or what `other_windows` raises of a corpus
            in `dwr.also_validate_on`.
    """
    sizes = dwr.model_dump(include=set(DWRConfig.model_fields) - {"vocab_size"})
    config = DWRConfig(vocab_size=shards.padded_vocab_size, **sizes)
    others = {corpus: other_windows(corpus, shards, dwr.max_seq_len) for corpus in dwr.also_validate_on}
    identity = {
        "dwr": dwr.model_dump(),
        "seed": settings.seed,
        "device": settings.device,
        "num_threads": settings.num_threads,
        "tokens": sha256(shards.directory / "metadata.json"),
        "other_tokens": [sha256(other.shards.directory / "metadata.json") for other in others.values()],
        "num_processes": accelerator.num_processes,  # floats are added in another order
    }
    torch.manual_seed(settings.seed)
    model = DWRTransformer(config)
    knobs = {"balance_coefficient", "balance_window", "balance_rate", "reuse_coefficient", "reuse_half_life"}
    knobs |= {"cache_prior", "cache_prior_experts"}
    objective = DWRObjective(config, **dwr.model_dump(include=knobs), seed=settings.seed)
    trainer = Trainer(
        model,
        objective,
        training,
        validation,
        dwr.training,
        total_steps=steps_in_epochs(dwr.training, len(training)),
        accelerator=accelerator,
        seed=settings.seed,
        scratch=scratch_folder(stage, run_id(identity)),
        also_validate_on=others,
        early_stopping_patience=dwr.training.early_stopping_patience,
        after_step=lambda steps: objective.end_step(model, steps, accelerator.reduce),
    )
    return trainer, identity
