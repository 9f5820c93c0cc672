"""Trains the DWR model and measures what its routers do.

    python stages/dwr/train_dwr.py

Reads   data/tokens/<dwr.corpus>, and of the corpora in dwr.also_validate_on
Writes  data/dwr/train/            best.safetensors (weights), last.safetensors (the full resume state), run.json,
                                   summary.json (losses, sizes and checks)
        reports/dwr/training.csv   a row for each validation
        reports/dwr/router.csv     gate norm and load of every expert, on the validation split
        data/dwr/measured/training.json  seconds, tokens/s, memory

A run that was stopped resumes from its last checkpoint in .scratch/train_dwr/.
"""

import shutil
from pathlib import Path

import torch

from dynaroute.analysis.routers import router_gradients, router_rows
from dynaroute.config import Settings
from dynaroute.data.tokens.shards import Windows, open_splits
from dynaroute.dwr.training import make_trainer
from dynaroute.dwr.windows import benchmark_windows, traced_windows
from dynaroute.pipeline.artifacts import output_directory, write_csv, write_json
from dynaroute.pipeline.machine import describe_machine, peak_memory
from dynaroute.pipeline.scratch import run_id
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import load_checkpoint, load_weights
from dynaroute.training.loop import make_accelerator, own_share, with_all_columns

REPORTS = Path("reports/dwr")


def main(settings: Settings) -> None:
    """Trains, then publishes the checkpoints and what was found."""
    dwr = settings.dwr
    torch.set_num_threads(settings.num_threads)
    accelerator = make_accelerator(settings.device, dwr.training.precision)
    shards = open_splits(Path("data/tokens") / dwr.corpus)
    training = Windows(shards["train"], dwr.max_seq_len, keep_tail=False)
    validation, test = (Windows(shards[split], dwr.max_seq_len, keep_tail=True) for split in ("validation", "test"))
    trainer, identity = make_trainer(settings, dwr, accelerator, shards["train"], training, validation, "train_dwr")
    identifier, objective = run_id(identity), trainer.objective
    model, config = trainer.unwrapped, objective.config
    # What is refused when there is too little text is refused now, and not after the training; also for later stages.
    own_share(test, accelerator)
    traced_windows(shards["test"], dwr.max_seq_len, settings.trace_routing)
    benchmark_windows(shards["test"], settings.benchmark_cache)
    with trainer:
        state = trainer.run()
        gradients = router_gradients(model, training)
        weights, best = load_checkpoint(trainer.best_path)
        load_weights(model, weights, trainer.best_path)
        sums = trainer.validation_sums(validation)
        validated = objective.validation_metrics(sums)
        tested = objective.validation_metrics(trainer.validation_sums(test))
        if not accelerator.is_main_process:
            return
        checks = {
            "parameter_count_matches_the_formula": sum(p.numel() for p in model.parameters()) == config.num_params(),
            "nll_gradient_reaches_every_router": all(router > 1e-6 * expert for router, expert in gradients),
            "best_checkpoint_reproduces_its_validation_loss": validated["loss"] == best["validation_loss"],
            "validation_loss_is_below_unigram_entropy": validated["loss"] < shards["validation"].unigram_entropy,
        }
        with output_directory("data/dwr/train") as folder:
            shutil.copyfile(trainer.best_path, folder / "best.safetensors")
            shutil.copyfile(trainer.last_path, folder / "last.safetensors")
            write_json(folder / "run.json", {"run": identifier, "config": config.model_dump(), "identity": identity})
            write_json(
                folder / "summary.json",
                {
                    "run": identifier,
                    "parameters": config.num_params(),
                    "active_parameters": config.num_active_params(),
                    "training_tokens": shards["train"].num_tokens,
                    "steps": state.step,
                    "steps_planned": trainer.total_steps,
                    "steps_per_epoch": trainer.steps_per_epoch,
                    "stopped_early": state.step < trainer.total_steps,
                    "precision": "bf16" if accelerator.mixed_precision == "bf16" else "fp32",
                    "best_step": state.best_step,
                    "best_validation_loss": validated["loss"],
                    "test_loss": tested["loss"],
                    "validation_unigram_entropy": shards["validation"].unigram_entropy,
                    "checks": checks,
                },
            )
        write_csv(REPORTS / "training.csv", with_all_columns(state.history))
        write_csv(REPORTS / "router.csv", router_rows(model, sums))
        write_json(
            "data/dwr/measured/training.json",
            {
                "seconds": trainer.seconds,
                "tokens_per_second": state.history[-1]["tokens"] / trainer.seconds,
                "peak_memory_bytes": peak_memory(settings.device),
                "machine": describe_machine(settings.device),
            },
        )
        trainer.discard_scratch()


if __name__ == "__main__":
    run(main, __doc__, launched=True)
