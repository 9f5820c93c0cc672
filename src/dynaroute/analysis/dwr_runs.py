"""DWR runs: models that are trained to be compared with each other, and what is measured of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaroute.analysis.replay import replay
from dynaroute.analysis.traces import Trace, record_routing, uniform_trace
from dynaroute.config import Settings
from dynaroute.config.dwr import DWRRun
from dynaroute.data.tokens.shards import Windows, open_splits
from dynaroute.data.tokens.windows import WindowSet, evenly_spaced
from dynaroute.dwr.experts.policies import LRU, Belady, NextUse
from dynaroute.dwr.experts.residency import Residency, nearest_a_third
from dynaroute.dwr.model import DWRTransformer
from dynaroute.dwr.training import make_trainer
from dynaroute.dwr.windows import traced_windows
from dynaroute.pipeline.scratch import run_id
from dynaroute.training.checkpoints import load_checkpoint, load_weights
from dynaroute.training.loop import make_accelerator, own_share

# Of a model, the windows of its test, those of its trace, and the trace.
Measure = Callable[[DWRTransformer, WindowSet, WindowSet, Trace], dict[str, Any]]


def train_and_measure(
    settings: Settings,
    name: str,
    dwr: DWRRun,
    publish: Callable[[dict[str, Any]], None],
    measure: Measure = lambda *_: {},
) -> None:
    """Trains the run `name`, scores its best weights, and replays their routing through caches.

    The main process hands what it found to `publish` before it discards what the run would resume from. Of its parts,
    `history` has a row for each validation and `losses` one for every tenth step. `measure` adds what
    else it finds in the best model.

    Raises:
        DynarouteError: there is too little text, or what the training raises.
    """
    section = f"dwr_runs.{name}"
    accelerator = make_accelerator(settings.device, dwr.training.precision)
    shards = open_splits(Path("data/tokens") / dwr.corpus)
    training = Windows(shards["train"], dwr.max_seq_len, keep_tail=False)
    training = evenly_spaced(training, dwr.train_windows, f"{section}.train_windows")
    held_out = {split: Windows(shards[split], dwr.max_seq_len, keep_tail=True) for split in ("validation", "test")}
    validation = evenly_spaced(held_out["validation"], dwr.validation_windows, f"{section}.validation_windows")
    test = evenly_spaced(held_out["test"], dwr.eval_windows, f"{section}.eval_windows")
    settings = settings.model_copy(update={"seed": dwr.seed})
    trainer, identity = make_trainer(settings, dwr, accelerator, shards["train"], training, validation, "train_dwr_run")
    own_share(test, accelerator)  # refuses too few now, and not after the training
    routed = traced_windows(shards["test"], dwr.max_seq_len, settings.trace_routing)
    with trainer:
        state = trainer.run()
        model = trainer.unwrapped
        weights, best = load_checkpoint(trainer.best_path)
        load_weights(model, weights, trainer.best_path)
        sums = trainer.validation_sums(validation)
        tested = trainer.objective.validation_metrics(trainer.validation_sums(test))
        if not accelerator.is_main_process:
            return
        identifier, config = run_id(identity), trainer.objective.config
        load = sums["assigned"] / sums["assigned"].mean(1, keepdim=True)  # [L, E], 1 is uniform
        trace = record_routing(model.cpu(), routed, identifier)
        experts = config.num_layers * config.num_experts
        capacity = nearest_a_third(experts)
        publish(
            {
                "name": name,
                "run": identifier,
                "settings": dwr.model_dump(),
                "parameters": config.num_params(),
                "training_tokens": len(training) * dwr.max_seq_len,
                "steps": state.step,
                "steps_planned": trainer.total_steps,
                "epochs": state.step / trainer.steps_per_epoch,
                "best_step": state.best_step,
                "best_epoch": state.best_step / trainer.steps_per_epoch,
                "validation_loss": best["validation_loss"],
                "test_loss": tested["loss"],
                "test_unigram_entropy": shards["test"].unigram_entropy,
                "largest_load": float(load.max()),
                "smallest_load": float(load.min()),
                "experts": experts,
                "capacity": capacity,
                "trace_tokens": len(trace.experts),
                "hit_rate": hit_rates(trace, config.num_experts, capacity),
                "uniform_hit_rate": hit_rates(uniform_trace(trace), config.num_experts, capacity),
                "history": state.history,
                "losses": state.losses,
                **measure(model, test, routed, trace),
            }
        )
        trainer.discard_scratch()


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
