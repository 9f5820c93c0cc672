"""Writes the base that DAGFormer wires as an ordinary transformers folder: pretrained here, or loaded.

    python stages/dagformer/prepare_base.py

Reads   data/tokens/<dagformer.corpus>
Writes  data/dagformer/train/base/         config.json, model.safetensors, the tokenizer; in the dtype that
            dagformer.precision means on this device, and in which every stage then computes with it
        data/dagformer/base.json           NLL of validation windows with all gates at one and at zero, zero_minus_one
            their paired difference (mean, low, high, n), checks
        data/dagformer/base.csv            a row for each validation of the pretraining; empty for a loaded base
        data/dagformer/measured/base.json  time and memory

A stopped pretraining resumes from its last checkpoint in .scratch/prepare_base/.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dynaroute.analysis.base import measure_base
from dynaroute.config import Settings
from dynaroute.config.dagformer import LoadedBase
from dynaroute.dagformer.bases import load_existing, make_trainer
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.locate import locate
from dynaroute.data.tokens.shards import TokenShards, open_splits
from dynaroute.pipeline.artifacts import output_directory, sha256, write_csv, write_json
from dynaroute.pipeline.machine import compute_dtype, describe_machine, peak_memory
from dynaroute.pipeline.scratch import run_id, scratch_folder
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import load_checkpoint, load_weights
from dynaroute.training.loop import make_accelerator, with_all_columns

DATA = Path("data/dagformer")
BASE = DATA / "train/base"


def main(settings: Settings) -> None:
    """Writes the base, and measures how much its wiring matters."""
    torch.set_num_threads(settings.num_threads)
    dagformer = settings.dagformer
    precision = "fp32" if isinstance(dagformer.base, LoadedBase) else dagformer.base.training.precision
    accelerator = make_accelerator(settings.device, precision)  # first: it gives each process its own GPU
    tokens = Path("data/tokens") / dagformer.corpus
    shards = open_splits(tokens)
    # Refuses too few windows, for later stages too, before a pretraining.
    windows = {split: variant_windows(own, dagformer) for split, own in shards.items()}
    dtype = compute_dtype(settings.device, dagformer.precision)
    identity = {
        "base": dagformer.base.model_dump() | locate(dagformer.base, "dagformer.base"),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": settings.seed,
        "device": settings.device,
        "num_threads": settings.num_threads,
        "seq_len": dagformer.seq_len,
        "tokens": sha256(tokens / "metadata.json"),
    }
    report = {"run": run_id(identity), "kind": dagformer.base.kind, "dtype": identity["dtype"]}
    if isinstance(dagformer.base, LoadedBase):
        if not accelerator.is_main_process:
            return
        model, tokenizer = load_existing(dagformer.base, shards["train"], dagformer.corpus, dagformer.seq_len)
        with output_directory(BASE) as folder:
            model.to(dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        history, timing = [{"step": None, "validation_loss": None}], {}
    else:
        model, history, timing = pretrain(settings, accelerator, shards, report["run"], dtype)
    if model is None:
        return  # not the main process
    write_csv(DATA / "base.csv", history)
    losses = [row["validation_loss"] for row in history if row["step"] is not None]
    config = model.config
    report |= {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "validation_loss": min(losses) if losses else None,
        "unigram_entropy": shards["validation"].unigram_entropy,
    }
    measures = measure_base(BASE, windows["validation"], settings.device)
    write_json(DATA / "base.json", report | measures)
    timing |= {"peak_memory_bytes": peak_memory(settings.device), "machine": describe_machine(settings.device)}
    write_json(DATA / "measured/base.json", timing)


def pretrain(
    settings: Settings,
    accelerator: Accelerator,
    shards: dict[str, TokenShards],
    identifier: str,
    dtype: torch.dtype,
) -> tuple[torch.nn.Module | None, list[dict[str, Any]], dict[str, float]]:
    """Trains a small base and writes it in `dtype` with the corpus's tokenizer; model, history and timing."""
    trainer = make_trainer(settings, accelerator, shards, scratch_folder("prepare_base", identifier))
    with trainer:
        state = trainer.run()
        if not accelerator.is_main_process:
            return None, [], {}
        model = trainer.unwrapped
        weights, _ = load_checkpoint(trainer.best_path)
        load_weights(model, weights, trainer.best_path)
        with output_directory(BASE) as folder:
            model.to(dtype).save_pretrained(folder)
            shutil.copytree(shards["train"].directory / "tokenizer", folder, dirs_exist_ok=True)
        trainer.discard_scratch()
    return model, with_all_columns(state.history), {"training_seconds": trainer.seconds}


if __name__ == "__main__":
    run(main, __doc__, launched=True)
