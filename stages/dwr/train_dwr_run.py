"""Trains one DWR run of `dwr_runs`, and measures it: losses, and hit rates at a third of its experts.

    python stages/dwr/train_dwr_run.py reference

Reads   data/dwr/runs/<name>.yaml, data/tokens/<corpus of the run>
Writes  data/dwr/run_results/<name>.json  what was found; weights are not kept

A run that was stopped goes on from its last checkpoint in .scratch/train_dwr_run/.
"""

from pathlib import Path

import torch
from pydantic import ValidationError

from dynaroute.analysis.replay import replay
from dynaroute.analysis.traces import Trace, record_routing, uniform_trace
from dynaroute.config import Settings
from dynaroute.config.dwr import DWRRun
from dynaroute.data.tokens.shards import Windows, open_splits
from dynaroute.data.tokens.windows import Subset, evenly_spaced
from dynaroute.dwr.experts.policies import LRU, Belady, NextUse
from dynaroute.dwr.experts.residency import Residency, nearest_a_third
from dynaroute.dwr.training import make_trainer
from dynaroute.dwr.windows import traced_windows
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.scratch import run_id
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import load_checkpoint, load_weights
from dynaroute.training.loop import make_accelerator, own_share

RESULTS = Path("data/dwr/run_results")


def main(settings: Settings, name: str) -> None:
    """Trains, scores the last and the best weights, and replays the routing of the best through caches."""
    torch.set_num_threads(settings.num_threads)
    dwr, section = read_run(name), f"dwr_runs.{name}"
    accelerator = make_accelerator(settings.device, dwr.training.precision)
    shards = open_splits(Path("data/tokens") / dwr.corpus)
    training = Windows(shards["train"], dwr.max_seq_len, keep_tail=False)
    training = evenly_spaced(training, dwr.train_windows, f"{section}.train_windows")
    held_out = {split: Windows(shards[split], dwr.max_seq_len, keep_tail=True) for split in ("validation", "test")}
    validation = evenly_spaced(held_out["validation"], dwr.validation_windows, f"{section}.validation_windows")
    test = evenly_spaced(held_out["test"], dwr.eval_windows, f"{section}.eval_windows")
    trainer, identity = make_trainer(settings, dwr, accelerator, shards["train"], training, validation, "train_dwr_run")
    # As many windows of the training text as of the validation text: the same loss, without dropout.
    scored = min(len(validation), len(training))
    seen = Subset(training, [index * len(training) // scored for index in range(scored)])

    def loss(windows: Subset) -> float:
        return trainer.objective.validation_metrics(trainer.validation_sums(windows))["loss"]

    own_share(test, accelerator)  # refuses too few now, and not after the training
    routed = traced_windows(shards["test"], dwr.max_seq_len, settings.trace_routing)
    with trainer:
        state = trainer.run()
        final_train_loss = loss(seen)
        model = trainer.unwrapped
        weights, best = load_checkpoint(trainer.best_path)
        load_weights(model, weights, trainer.best_path)
        sums = trainer.validation_sums(validation)
        train_loss, test_loss = loss(seen), loss(test)
        if not accelerator.is_main_process:
            return
        identifier, config = run_id(identity), trainer.objective.config
        load = sums["assigned"] / sums["assigned"].mean(1, keepdim=True)  # [L, E], 1 is uniform
        trace = record_routing(model.cpu(), routed, identifier)
        experts = config.num_layers * config.num_experts
        capacity = nearest_a_third(experts)
        write_json(
            RESULTS / f"{name}.json",
            {
                "name": name,
                "run": identifier,
                "settings": dwr.model_dump(),
                "parameters": config.num_params(),
                "training_tokens": len(training) * dwr.max_seq_len,
                "steps": state.step,
                "epochs": state.step / trainer.steps_per_epoch,
                "best_step": state.best_step,
                "best_epoch": state.best_step / trainer.steps_per_epoch,
                "train_loss": train_loss,
                "validation_loss": best["validation_loss"],
                "test_loss": test_loss,
                "test_unigram_entropy": shards["test"].unigram_entropy,
                "final_train_loss": final_train_loss,
                "final_validation_loss": state.history[-1]["validation_loss"],
                "largest_load": float(load.max()),
                "smallest_load": float(load.min()),
                "experts": experts,
                "capacity": capacity,
                "trace_tokens": len(trace.experts),
                "hit_rate": hit_rates(trace, config.num_experts, capacity),
                "uniform_hit_rate": hit_rates(uniform_trace(trace), config.num_experts, capacity),
            },
        )
        trainer.discard_scratch()


def read_run(name: str) -> DWRRun:
    """All knobs of a run, as resolve_variants wrote them.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    path = Path("data/dwr/runs") / f"{name}.yaml"
    try:
        return DWRRun.model_validate(read_record(path))
    except ValidationError as error:
        raise DynarouteError(f"{path}: not the knobs of a run: run resolve_variants again") from error


def hit_rates(trace: Trace, num_experts: int, capacity: int) -> dict[str, float]:
    """Hit rates of a replayed trace of a model with `num_experts` a layer, under one budget for all layers."""
    _, num_layers, top_k = trace.experts.shape
    policies = {"lru": LRU(), "next_use": NextUse(num_layers, num_experts), "min": Belady(trace.calls())}
    rates = {}
    for name, policy in policies.items():
        residency = Residency(capacity, policy, num_layers, top_k)
        replay(trace, residency)
        rates[name] = residency.statistics.hit_rate
    return rates


if __name__ == "__main__":
    run(main, __doc__, "name", launched=True)
