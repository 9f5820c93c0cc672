"""Trains the predictor of one DAGFormer variant on a frozen base, or jointly with a copy of the base.

    python stages/dagformer/train_dagformer.py P1

Reads   data/dagformer/variants/<id>.yaml, data/dagformer/train/base, data/dagformer/embeddings,
        data/tokens/<dagformer.corpus>; for a variant that continues another: data/dagformer/train/<from>, and the
        settings of all variants it descends from
Writes  data/dagformer/train/<id>/
            predictor.safetensors     final weights
            last.safetensors          the full resume state
            run.json                  settings, sizes and the identity of the run
            base/                     only if trained jointly (in fp32): a transformers folder in the base's dtype
            training.csv              a row for each validation
            training.json             summary and checks
        data/dagformer/measured/<id>.json   time and memory

A stopped run resumes from its last checkpoint in .scratch/train_dagformer/.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from dynaroute.config import Settings, Variant
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.joint import JointModel
from dynaroute.dagformer.objective import DagObjective, health
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.dagformer.variants import read_variant, seed_of
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, sha256, write_csv, write_json
from dynaroute.pipeline.machine import describe_machine, peak_memory
from dynaroute.pipeline.scratch import run_id, scratch_folder
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import save_checkpoint
from dynaroute.training.loop import Trainer, make_accelerator, with_all_columns

DATA = Path("data/dagformer")
TRAINED = DATA / "train"
SURELY_OPEN = 2.0  # an init_logit, around which logits start with a standard deviation of 0.1
NEARLY_OPEN = 0.8  # soft gates


def main(settings: Settings, name: str) -> None:
    """Trains, then publishes the predictor and what was found."""
    started = time.perf_counter()
    torch.set_num_threads(settings.num_threads)
    dagformer = settings.dagformer
    start, variant = read_variant(DATA / "variants", name)
    accelerator = make_accelerator(settings.device, "fp32")  # first: it gives each process its own GPU
    tokens = Path("data/tokens") / dagformer.corpus
    shards = {split: TokenShards(tokens, split) for split in ("train", "validation")}
    windows = {split: Windows(own, dagformer.seq_len, keep_tail=False) for split, own in shards.items()}
    training = Subset(windows["train"], dagformer.train_windows)
    validation = Subset(windows["validation"], dagformer.validation_windows)
    embeddings = load_embeddings(DATA / "embeddings/training")
    joint = variant.base_lr > 0
    frozen = load_base(TRAINED / "base", settings.device)
    base_before = fingerprint(frozen)
    if joint:  # in fp32 on any device: steps are small beside what bf16 can tell apart
        graph = DagForward(load_base(TRAINED / "base", settings.device).float(), variant.input_norm, trainable=True)
    else:
        graph = DagForward(frozen, variant.input_norm)

    identity = {
        "variant": variant.model_dump(),
        "dagformer": {  # numbers of windows and not what params.yaml says: null may come to the same
            "corpus": dagformer.corpus,
            "seq_len": dagformer.seq_len,
            "train_windows": len(training),
            "validation_windows": len(validation),
        },
        "device": settings.device,
        "num_threads": settings.num_threads,
        "base": sha256(TRAINED / "base" / "model.safetensors"),
        "base_dtype": str(frozen.dtype).removeprefix("torch."),
        "embeddings": sha256(DATA / "embeddings/training/metadata.json"),
        "start": None if start == "base" else sha256(TRAINED / start / "last.safetensors"),
    }
    identifier = run_id(identity)
    if joint and accelerator.num_processes > 1:  # gradients of a base outside the wrapped model are not shared
        found = f"{accelerator.num_processes} processes: a joint variant is trained by one: launch it with python"
        raise DynarouteError(f"variants.{name}.base_lr = {variant.base_lr:g}: {found}")
    torch.manual_seed(variant.seed)
    predictor = StructurePredictor(variant, graph.num_layers, graph.num_heads, embeddings["train"].shape[1])
    predictor.fit_normalisation(embeddings["train"])
    seed = seed_of(DATA / "variants", start, variant)
    objective = DagObjective(
        graph,
        variant,
        torch.from_numpy(embeddings["train"]),
        torch.from_numpy(embeddings["validation"]),
        seed,
        DagForward(frozen) if joint else None,
    )
    model = JointModel(predictor, graph.base) if joint else predictor
    trainer = Trainer(
        model,
        objective,
        training,
        validation,
        variant,
        total_steps=variant.steps,
        accelerator=accelerator,
        seed=seed,
        scratch=scratch_folder("train_dagformer", identifier),
        start=None if start == "base" else TRAINED / start / "last.safetensors",
        parameter_groups=model.parameter_groups(variant) if joint else None,
        remark=lambda history: alarm(history, variant.alarm_steps),
        keep_best=False,  # the weights that count are those at the final tau and lambda
    )
    loading_seconds = time.perf_counter() - started
    with trainer:
        state = trainer.run()
        if not accelerator.is_main_process:
            return
        found, reason = health(state.history, variant.alarm_steps)
        first, last = state.history[0], state.history[-1]
        checks = {
            "base_is_unchanged_to_the_bit": fingerprint(frozen) == base_before,
            "base_holds_no_gradients": all(p.grad is None and not p.requires_grad for p in frozen.parameters()),
        }
        if start == "base" and graph.base.dtype == frozen.dtype:
            checks |= checks_before_training(variant, first)
        metrics = {key.removeprefix("validation_"): last[key] for key in last if key.startswith("validation_")}
        with output_directory(TRAINED / name) as folder:
            weights = predictor.state_dict()
            save_checkpoint(folder / "predictor.safetensors", weights, {"run": identifier, "step": state.step})
            if joint:
                graph.base.to(frozen.dtype).save_pretrained(folder / "base")  # scored as the baseline is
            shutil.copyfile(trainer.last_path, folder / "last.safetensors")
            write_json(
                folder / "run.json",
                {
                    "run": identifier,
                    "variant": name,
                    "from": start,
                    "knobs": variant.model_dump(),
                    "num_layers": graph.num_layers,
                    "num_heads": graph.num_heads,
                    "embedding_size": embeddings["train"].shape[1],
                    "identity": identity,
                },
            )
            write_csv(folder / "training.csv", with_all_columns(state.history))
            write_json(
                folder / "training.json",
                {
                    "run": identifier,
                    "variant": name,
                    "steps": state.step,
                    "tokens": last["tokens"],
                    "predictor_parameters": sum(p.numel() for p in predictor.parameters()),
                    **metrics,
                    "health": found,
                    "health_reason": reason,
                    "checks": checks,
                },
            )
        write_json(
            DATA / "measured" / f"{name}.json",
            {
                "seconds": trainer.seconds,
                "seconds_per_step": trainer.seconds / state.step,
                "validation_seconds": trainer.validation_seconds / len(state.history),
                "loading_seconds": loading_seconds,
                "peak_memory_bytes": peak_memory(settings.device),
                "machine": describe_machine(settings.device),
            },
        )
        trainer.discard_scratch()


def checks_before_training(variant: Variant, row: dict[str, Any]) -> dict[str, bool]:
    """That gates which a new predictor leaves open change nothing, from the validation before the first step.

    Empty where that is not so by design: gates that do not all start open, a layer 0 that the cascade shuts, or an
    input norm that changes what open gates let through.
    """
    if variant.init_logit < SURELY_OPEN or variant.input_norm not in ("none", "gate_mean"):
        return {}
    if variant.cascade != "off" and not variant.exempt_first_layer:
        return {}
    soft, hard, dense = (row[f"validation_nll_{mode}"] for mode in ("soft", "hard", "baseline"))
    checks = {"hard_nll_is_the_baseline_before_training": abs(hard - dense) < 1e-5}
    if 1 / (1 + math.exp(-variant.init_logit / variant.tau_init)) > NEARLY_OPEN:
        checks["soft_nll_is_within_1_percent_of_the_baseline_before_training"] = abs(soft / dense - 1) < 0.01
    return checks


def alarm(history: list[dict[str, Any]], alarm_steps: int) -> str:
    """The alarm that a run raises, or an empty string."""
    found, reason = health(history, alarm_steps)
    return f"alarm: {found}: {reason}" if found in ("collapsed", "saturated") else ""


def fingerprint(model: torch.nn.Module) -> list[int]:
    """A hash of every parameter's bytes."""
    return [hash(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()) for p in model.parameters()]


if __name__ == "__main__":
    run(main, __doc__, "name", launched=True)
