"""Trains the predictor of one DAGFormer variant on a frozen base, or jointly with a copy of the base.

    python stages/dagformer/train_dagformer.py P1

Reads   data/dagformer/variants/<id>.yaml, data/dagformer/train/{base,planted}, data/dagformer/embeddings,
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

import shutil
import time
from pathlib import Path

import torch

from dynaroute.config import Settings
from dynaroute.dagformer.health import checks_before_training, health
from dynaroute.dagformer.training import make_trainer
from dynaroute.dagformer.variants import read_variant
from dynaroute.pipeline.artifacts import output_directory, write_csv, write_json
from dynaroute.pipeline.machine import describe_machine, peak_memory
from dynaroute.pipeline.scratch import run_id
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import save_checkpoint
from dynaroute.training.loop import make_accelerator, with_all_columns

DATA = Path("data/dagformer")


def main(settings: Settings, name: str) -> None:
    """Trains, then writes the predictor and the record of its training."""
    started = time.perf_counter()
    torch.set_num_threads(settings.num_threads)
    start, variant = read_variant(DATA / "variants", name)
    accelerator = make_accelerator(settings.device, "fp32")  # first: it gives each process its own GPU
    trainer, predictor, identity = make_trainer(settings, name, start, variant, DATA, accelerator)
    graph, frozen = trainer.objective.graph, trainer.objective.dense.base
    base_before, identifier = fingerprint(frozen), run_id(identity)
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
        # The planted base is made to change with every edge, so nearly open gates are not nearly the baseline there.
        if start == "base" and graph.base.dtype == frozen.dtype:
            checks |= checks_before_training(variant, first)
        metrics = {key.removeprefix("validation_"): last[key] for key in last if key.startswith("validation_")}
        with output_directory(DATA / "train" / name) as folder:
            weights = predictor.state_dict()
            save_checkpoint(folder / "predictor.safetensors", weights, {"run": identifier, "step": state.step})
            if variant.base_lr > 0:
                graph.base.to(frozen.dtype).save_pretrained(folder / "base")  # scored as the baseline is
            shutil.copyfile(trainer.last_path, folder / "last.safetensors")
            write_json(
                folder / "run.json",
                {
                    "run": identifier,
                    "variant": name,
                    "from": start,
                    "base": identity["base_name"],
                    "knobs": variant.model_dump(),
                    "num_layers": graph.num_layers,
                    "num_heads": graph.num_heads,
                    "embedding_size": len(predictor.embedding_mean),
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


def fingerprint(model: torch.nn.Module) -> list[int]:
    """A hash of every parameter's bytes."""
    return [hash(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()) for p in model.parameters()]


if __name__ == "__main__":
    run(main, __doc__, "name", launched=True)
