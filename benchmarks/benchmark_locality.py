"""How far training for locality goes: perplexity against hit rates of experts, each setting with three seeds.

    PYTHONPATH=src python benchmarks/benchmark_locality.py reference  (dvc repro benchmarks/dvc.yaml:benchmark_locality)
    PYTHONPATH=src python benchmarks/benchmark_locality.py larger     (... benchmark_locality_larger)

`reference` trains all settings at the size of dwr_runs.reference, `larger` some at that of dwr, on all of its text.

Reads   data/tokens/<corpus of the runs>
Writes  reports/benchmarks/locality_<size>.csv  rows for each setting: run, that of the first seed; perplexity with a
        95 % interval over seeds, loads of experts (1 is uniform), and means over seeds of hit rates and simulated
        tokens/s. `routing` is

            exact             as trained
            inexact ALPHA     cache-aware, with a third of each layer's experts; kl is that to exact routing
            shuffled text     exact, of windows whose tokens come in random order
            shuffled routing  exact, with the tokens of the trace in random order

Capacities are a sixth, a third and half of the reference's experts for every setting. Speeds are those of LRU at a
third, of the first model of simulate_cache. `reaches_goal`: twice the reference's hits of LRU at a third, a mean
perplexity not above its interval, and no expert with less than 0.3 of the uniform load.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dynaroute.analysis.dwr_runs import Measure, train_and_measure
from dynaroute.analysis.locality import (
    ShuffledText,
    all_hit_rates,
    route_cache_aware,
    shuffled_trace,
    tokens_per_second,
)
from dynaroute.analysis.replay import Seconds
from dynaroute.analysis.statistics import paired_difference
from dynaroute.analysis.traces import Trace, record_routing
from dynaroute.config import Settings
from dynaroute.config.dwr import DWRRun
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.dwr.experts.residency import nearest_a_third
from dynaroute.dwr.model import DWRTransformer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_csv
from dynaroute.pipeline.stage import run

SEEDS = 3  # that of the reference and those after it
ALPHAS = (0.5, 1.0)  # logits by which cache-aware routing prefers held experts
USED = 0.3  # of the uniform load, from which on an expert counts as used

LOSS_FREE = {"balance": "loss_free", "balance_coefficient": 0.0, "balance_window": 1, "balance_rate": 0.1}
REUSE = {"reuse_coefficient": 0.05, "reuse_half_life": 3.0}
PRIOR = {"cache_prior": 1.0}
RECIPE = LOSS_FREE | REUSE
SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    **{f"lambda_{value:g}": {"balance_coefficient": value} for value in (0.0, 0.001, 0.1)},
    "accumulated": {"balance": "auxiliary_accumulated", "balance_window": 16},
    "loss_free": LOSS_FREE,
    "reuse": REUSE,
    "prior": PRIOR,
    "accumulated_reuse": {"balance": "auxiliary_accumulated", "balance_window": 16} | REUSE,
    "recipe": RECIPE,
    **{f"recipe_reuse_{value:g}": RECIPE | {"reuse_coefficient": value} for value in (0.005, 0.01, 0.02, 0.1)},
    **{f"recipe_half_life_{value:g}": RECIPE | {"reuse_half_life": value} for value in (8.0, 32.0)},
    "recipe_prior": RECIPE | PRIOR,
}
COLLAPSED = "lambda_0"  # also trained with only as many experts as it uses
LARGER = ("reference", "loss_free", "recipe_reuse_0.005", "recipe_reuse_0.01", "recipe_reuse_0.02")


def main(settings: Settings, size: str) -> None:
    """Trains one run after another, and writes the table."""
    torch.set_num_threads(settings.num_threads)
    if size == "larger":
        fewer = {"train_windows": None, "validation_windows": 128, "eval_windows": 400}
        knobs = settings.dwr.model_dump() | fewer | {"also_validate_on": [], "seed": settings.seed}
        base, chosen = DWRRun.model_validate(knobs), {name: SETTINGS[name] for name in LARGER}
    elif size == "reference":
        base, chosen = settings.dwr_run("reference"), SETTINGS
    else:
        raise DynarouteError(f"size = {size!r}: must be reference or larger")
    measure = measurements(settings, base)
    found = {name: with_seeds(settings, name, base, own, measure) for name, own in chosen.items()}
    if COLLAPSED in found:
        used = np.mean([one["experts_used"] for one in found[COLLAPSED]])  # of a layer
        fewer = SETTINGS[COLLAPSED] | {"num_experts": max(2, base.top_k, round(used))}
        found["fewer_experts"] = with_seeds(settings, "fewer_experts", base, fewer, measure)
    write_csv(f"reports/benchmarks/locality_{size}.csv", table(found))


def with_seeds(
    settings: Settings, name: str, base: DWRRun, overrides: dict[str, Any], measure: Measure
) -> list[dict[str, Any]]:
    """What was found with each seed."""
    knobs, found = base.model_dump() | {"cache_prior_experts": cached_of_a_layer(base)} | overrides, []
    for seed in range(base.seed, base.seed + SEEDS):
        train_and_measure(settings, name, DWRRun.model_validate(knobs | {"seed": seed}), found.append, measure)
    return found


def cached_of_a_layer(dwr: DWRRun) -> int:
    """The experts of a layer that a simulated cache holds: a third, but as many as a token needs."""
    return max(dwr.top_k, nearest_a_third(dwr.num_experts))


def measurements(settings: Settings, base: DWRRun) -> Measure:
    """What `table` shows of a run besides what `train_and_measure` finds."""
    experts, simulate = base.num_layers * base.num_experts, settings.simulate_cache
    capacities = {"sixth": max(1, round(experts / 6)), "third": nearest_a_third(experts), "half": experts // 2}
    of = next(iter(simulate.models.values()))
    machines = {f"tokens_per_second_{name}": Seconds.of(on, of) for name, on in simulate.machines.items()}

    def hits(trace: Trace, num_experts: int, shares: Sequence[str] = ("third",)) -> dict[str, float]:
        rates = {share: all_hit_rates(trace, num_experts, capacities[share]) for share in shares}
        return {f"{policy}_{share}": rate for share, own in rates.items() for policy, rate in own.items()}

    def speeds(trace: Trace) -> dict[str, float]:
        return tokens_per_second(trace, capacities["third"], machines)

    def measure(model: DWRTransformer, test: WindowSet, routed: WindowSet, trace: Trace) -> dict[str, Any]:
        number = model.config.num_experts
        load = np.stack([np.bincount(layer.ravel(), minlength=number) for layer in trace.experts.swapaxes(0, 1)])
        held = min(cached_of_a_layer(base), number)
        shuffled, inexact = record_routing(model, ShuffledText(routed), ""), {}
        for alpha in ALPHAS:
            aware = route_cache_aware(model, test, held, alpha)
            found = hits(aware.trace, number) | speeds(aware.trace) | {"loss": aware.loss, "kl": aware.kl}
            inexact[f"inexact {alpha:g}"] = found
        return {
            "experts_used": float((load >= USED * load.mean()).sum(1).mean()),
            "routing": {
                "exact": hits(trace, number, [*capacities]) | speeds(trace),
                **inexact,
                "shuffled text": hits(shuffled, number),
                "shuffled routing": hits(shuffled_trace(trace), number),
            },
        }

    return measure


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the table, all with the same columns."""
    rows = []
    for name, runs in found.items():
        for routing in runs[0]["routing"]:
            own = [dict(run["routing"][routing]) for run in runs]
            losses = (
                [run["test_loss"] for run in runs] if routing == "exact" else [one.pop("loss", None) for one in own]
            )
            row = {"setting": name, "routing": routing, "run": runs[0]["run"], "seeds": len(runs)}
            if None not in losses:
                mean, low, high, _ = paired_difference(np.array(losses), np.zeros(len(losses)))
                row |= {
                    "perplexity": math.exp(mean),
                    "perplexity_low": math.exp(low),
                    "perplexity_high": math.exp(high),
                }
            if routing == "exact":
                row["smallest_load"] = min(run["smallest_load"] for run in runs)
                row["largest_load"] = max(run["largest_load"] for run in runs)
            rows.append(row | {key: float(np.mean([one[key] for one in own])) for key in own[0]})
    reference = rows[0]
    for row in (row for row in rows if row["routing"] == "exact"):
        row["reaches_goal"] = (
            row["lru_third"] >= 2 * reference["lru_third"]
            and row["perplexity"] <= reference["perplexity_high"]
            and row["smallest_load"] >= 0.3
        )
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


if __name__ == "__main__":
    run(main, __doc__, "size")
