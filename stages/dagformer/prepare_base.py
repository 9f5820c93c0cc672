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

from dynaroute.analysis.statistics import paired_difference
from dynaroute.config import LoadedBase, Settings
from dynaroute.dagformer.bases import LanguageModelObjective, load_existing, new_base
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.hub import load_model
from dynaroute.data.locate import locate
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import KEYS, Subset, dagformer_windows
from dynaroute.pipeline.artifacts import output_directory, sha256, write_csv, write_json
from dynaroute.pipeline.machine import compute_dtype, describe_machine, peak_memory
from dynaroute.pipeline.scratch import run_id, scratch_folder
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import load_checkpoint, load_weights
from dynaroute.training.loop import Trainer, make_accelerator, steps_in_epochs, with_all_columns

DATA = Path("data/dagformer")
BASE = DATA / "train/base"


def main(settings: Settings) -> None:
    """Makes or loads the base, and measures how much its wiring matters."""
    torch.set_num_threads(settings.num_threads)
    dagformer = settings.dagformer
    precision = "fp32" if isinstance(dagformer.base, LoadedBase) else dagformer.base.training.precision
    accelerator = make_accelerator(settings.device, precision)  # first: it gives each process its own GPU
    tokens = Path("data/tokens") / dagformer.corpus
    shards = {split: TokenShards(tokens, split) for split in KEYS}
    dagformer_windows(shards, dagformer)  # refuses too few for encode_windows now, and not after a pretraining
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
            load_base(folder, "cpu")  # refuses what later stages could not read
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
    write_json(DATA / "base.json", report | wiring_matters(settings, shards["validation"]))
    machine = describe_machine(settings.device)
    write_json(
        DATA / "measured/base.json",
        timing | {"peak_memory_bytes": peak_memory(settings.device), "machine": machine},
    )


def pretrain(
    settings: Settings,
    accelerator: Accelerator,
    shards: dict[str, TokenShards],
    identifier: str,
    dtype: torch.dtype,
) -> tuple[torch.nn.Module | None, list[dict[str, Any]], dict[str, float]]:
    """Trains a small base and writes it in `dtype` with the corpus's tokenizer; model, history and timing."""
    dagformer, wanted = settings.dagformer, settings.dagformer.base
    training = Windows(shards["train"], dagformer.seq_len, keep_tail=False)
    torch.manual_seed(settings.seed)
    model = new_base(wanted, shards["train"].padded_vocab_size, dagformer.seq_len, shards["train"].eot_id)
    trainer = Trainer(
        model,
        LanguageModelObjective(),
        training,
        Windows(shards["validation"], dagformer.seq_len, keep_tail=True),
        wanted.training,
        total_steps=steps_in_epochs(wanted.training, len(training)),
        accelerator=accelerator,
        seed=settings.seed,
        scratch=scratch_folder("prepare_base", identifier),
        early_stopping_patience=wanted.training.early_stopping_patience,
    )
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


@torch.inference_mode()
def wiring_matters(settings: Settings, shards: TokenShards) -> dict[str, Any]:
    """NLL of the saved base by transformers itself, and through the DAG with all gates at one and at zero."""
    dagformer = settings.dagformer
    theirs = load_model(str(BASE), "AutoModelForCausalLM", BASE, settings.device, "auto")
    base = load_base(BASE, settings.device)
    graph = DagForward(base)
    windows = Subset(Windows(shards, dagformer.seq_len, keep_tail=False), dagformer.validation_windows)
    nodes = graph.num_layers * graph.num_heads
    losses: dict[str, list[float]] = {"transformers": [], "one": [], "zero": []}  # of each window
    difference = 0.0
    for index in range(len(windows)):
        tokens, targets = (part.to(settings.device) for part in windows.batch([index]))
        logits = {"transformers": theirs(tokens).logits}
        for name, make in (("one", torch.ones), ("zero", torch.zeros)):
            logits[name] = graph(tokens, make(1, nodes, nodes, device=settings.device, dtype=base.dtype))
        for ours in (logits["one"], base(tokens)):
            difference = max(difference, float((ours - logits["transformers"]).abs().max()))
        for name, values in logits.items():
            losses[name].append(float(torch.nn.functional.cross_entropy(values.float()[0], targets[0])))
    means = {name: sum(values) / len(windows) for name, values in losses.items()}
    rise = paired_difference(losses["zero"], losses["one"])
    tolerance = 1e-5 if base.dtype == torch.float32 else 1e-2
    return {
        "nll_all_gates_one": means["one"],
        "nll_all_gates_zero": means["zero"],
        "zero_minus_one": rise._asdict(),
        "n": len(windows),
        "largest_logit_difference_to_transformers": difference,
        "checks": {
            "all_gates_at_one_reproduce_the_base": abs(means["one"] - means["transformers"]) < tolerance,
            "removing_all_head_connections_raises_nll": rise.low > 0,
        },
    }


if __name__ == "__main__":
    run(main, __doc__, launched=True)
