"""Pretrains the planted base: the positive control, whose best wiring of each source's texts is known.

    python stages/dagformer/plant_base.py

Reads   data/tokens/<dagformer.corpus>
Writes  data/dagformer/train/planted/         config.json, model.safetensors, masks.safetensors, the tokenizer; a
            folder without any of these if dagformer.planted is null
        data/dagformer/planted.csv            a row for each validation
        data/dagformer/measured/planted.json  time and memory

One process trains it, whatever the launcher. A stopped pretraining resumes from its last checkpoint in
.scratch/plant_base/.
"""

import shutil
from pathlib import Path

import torch

from dynaroute.config import Settings
from dynaroute.dagformer.planted import make_trainer, plant_masks, save_masks
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, sha256, write_csv, write_json
from dynaroute.pipeline.machine import describe_machine, peak_memory
from dynaroute.pipeline.scratch import run_id, scratch_folder
from dynaroute.pipeline.stage import run
from dynaroute.training.loop import make_accelerator, with_all_columns

DATA = Path("data/dagformer")


def main(settings: Settings) -> None:
    """Trains the base under its masks, and writes both."""
    torch.set_num_threads(settings.num_threads)
    dagformer, wanted = settings.dagformer, settings.dagformer.planted
    if wanted is None:
        with output_directory(DATA / "train/planted"):
            pass
        write_csv(DATA / "planted.csv", [{"step": None}])
        write_json(DATA / "measured/planted.json", {})
        return
    tokens = Path("data/tokens") / dagformer.corpus
    shards = {split: TokenShards(tokens, split) for split in ("train", "validation")}
    names = shards["train"].sources
    if len(names) < 2:
        found = f"corpus {dagformer.corpus} has one source, {names[0]}"
        raise DynarouteError(f"dagformer.planted: {found}: must have two at least, or dagformer.planted be null")
    identity = {
        "planted": wanted.model_dump(),
        "seed": settings.seed,
        "device": settings.device,
        "num_threads": settings.num_threads,
        "seq_len": dagformer.seq_len,
        "validation_windows": dagformer.validation_windows,
        "tokens": sha256(tokens / "metadata.json"),
    }
    masks = plant_masks(wanted, len(names), settings.seed)
    accelerator = make_accelerator(settings.device, wanted.training.precision)
    trainer = make_trainer(settings, accelerator, shards, masks, scratch_folder("plant_base", run_id(identity)))
    with trainer:
        state = trainer.run()
        with output_directory(DATA / "train/planted") as folder:
            trainer.unwrapped.save_pretrained(folder)
            save_masks(folder, masks, names)
            shutil.copytree(tokens / "tokenizer", folder, dirs_exist_ok=True)
        write_csv(DATA / "planted.csv", with_all_columns(state.history))
        timing = {"training_seconds": trainer.seconds, "peak_memory_bytes": peak_memory(settings.device)}
        write_json(DATA / "measured/planted.json", timing | {"machine": describe_machine(settings.device)})
        trainer.discard_scratch()


if __name__ == "__main__":
    run(main, __doc__)
