"""The training of one variant, ready to run: its base, predictor, objective and data."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dynaroute.config import Settings
from dynaroute.config.dagformer import BASES, Variant
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.health import alarm
from dynaroute.dagformer.joint import JointModel
from dynaroute.dagformer.objective import DagObjective
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.dagformer.variants import chain, seed_of
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256
from dynaroute.pipeline.scratch import run_id, scratch_folder
from dynaroute.training.loop import Trainer


def make_trainer(
    settings: Settings, name: str, start: str, variant: Variant, data: Path, accelerator: Accelerator
) -> tuple[Trainer, StructurePredictor, dict[str, Any]]:
    """The trainer of a new predictor, the predictor, and everything that its result depends on.

    Args:
        settings: device, threads, corpus and windows.
        name: the variant's.
        start: a base, or the variant whose final state this one continues.
        variant: its settings.
        data: the folder with variants, embeddings and train/{base,planted}.
        accelerator: of precision fp32.

    Raises:
        DynarouteError: an input is missing or damaged, the training does not fit windows and processes, or several
            processes are to train a base jointly.
    """
    joint = variant.base_lr > 0
    # Processes do not share the gradients of a base, which is outside the wrapped model.
    if joint and accelerator.num_processes > 1:
        found = f"{accelerator.num_processes} processes: such a variant is trained by one: launch it with python"
        raise DynarouteError(f"variants.{name}.base_lr = {variant.base_lr:g}: {found}")
    shared = settings.dagformer
    tokens = Path("data/tokens") / shared.corpus
    windows = {split: variant_windows(TokenShards(tokens, split), shared) for split in ("train", "validation")}
    embeddings = load_embeddings(data / "embeddings/training")
    base = data / "train" / chain(data / "variants", start)[-1]
    trained = None if start in BASES else data / "train" / start / "last.safetensors"
    frozen = load_base(base, settings.device)
    if joint:  # in fp32 on any device: steps are small beside the resolution of bf16
        graph = DagForward(load_base(base, settings.device).float(), variant.input_norm, trainable=True)
    else:
        graph = DagForward(frozen, variant.input_norm)
    identity = {
        "variant": variant.model_dump(),
        "dagformer": {  # the numbers of windows, because null in params.yaml may mean the same
            "corpus": shared.corpus,
            "seq_len": shared.seq_len,
            "train_windows": len(windows["train"]),
            "validation_windows": len(windows["validation"]),
        },
        "device": settings.device,
        "num_threads": settings.num_threads,
        "base": sha256(base / "model.safetensors"),
        "base_name": base.name,
        "base_dtype": str(frozen.dtype).removeprefix("torch."),
        "embeddings": sha256(data / "embeddings/training/metadata.json"),
        "start": None if trained is None else sha256(trained),
    }
    torch.manual_seed(variant.seed)
    predictor = StructurePredictor(variant, graph.num_layers, graph.num_heads, embeddings["train"].shape[1])
    predictor.fit_normalisation(embeddings["train"])
    vectors = (torch.from_numpy(embeddings[split]) for split in windows)
    seed = seed_of(data / "variants", start, variant)
    model = JointModel(predictor, graph.base) if joint else predictor
    trainer = Trainer(
        model,
        DagObjective(graph, variant, *vectors, seed, DagForward(frozen) if joint else None),
        windows["train"],
        windows["validation"],
        variant,
        total_steps=variant.steps,
        accelerator=accelerator,
        seed=seed,
        scratch=scratch_folder("train_dagformer", run_id(identity)),
        start=trained,
        parameter_groups=model.parameter_groups() if joint else None,
        remark=lambda history: alarm(history, variant.alarm_steps),
        keep_best=False,  # the result is the weights at the final tau and lambda
    )
    return trainer, predictor, identity
