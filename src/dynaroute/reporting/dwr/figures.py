"""The figures of the DWR reports."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaroute.reporting.dwr.findings import course, initial_gate_norm, relative_load
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, saved_figure
from dynaroute.reporting.inputs import Record

if TYPE_CHECKING:
    import pandas as pd

POLICIES: dict[str, dict[str, Any]] = {
    "min": {"color": BLACK, "linestyle": "--", "label": "MIN, which knows the future"},
    "next_use": {"color": VERMILION, "linestyle": "-", "marker": "s", "label": "next use"},
    "weighted_lru": {"color": GREEN, "linestyle": "-.", "marker": "^", "label": "frequency-weighted LRU"},
    "lru": {"color": BLUE, "linestyle": "-", "marker": "o", "label": "LRU"},
    "lfu": {"color": ORANGE, "linestyle": ":", "marker": "v", "label": "LFU"},
    "pinned": {"color": PURPLE, "linestyle": ":", "marker": "D", "label": "pinned by frequency"},
}


def plot_training(curve: "pd.DataFrame", summary: Record, path: str | Path) -> None:
    """Training and validation loss by step, against the unigram entropy of the validation text."""
    best, trained = course(curve).best, curve[curve["step"] > 0]
    every = 1 + len(curve) // 40  # markers that run into each other tell nothing
    # A training loss is a mean over all steps since the previous row, which belongs to the middle of them.
    middles = curve["step"].rolling(2).mean().loc[trained.index]
    with saved_figure(path, 6.4, 3.4) as figure:
        axes = figure.subplots()
        entropy = summary["validation_unigram_entropy"]
        axes.axhline(entropy, color=GREY, linestyle=":", label="unigram entropy of the validation text")
        label = "training, mean between validations"
        axes.plot(middles, trained["train_loss"], "s--", color=VERMILION, markevery=every, label=label)
        axes.plot(curve["step"], curve["validation_loss"], "o-", color=BLUE, markevery=every, label="validation")
        label = f"best validation: {best['validation_loss']:.3f} at step {best['step']:,.0f}"
        axes.plot(best["step"], best["validation_loss"], "*", color=BLACK, markersize=11, label=label)
        axes.set_xlabel(f"optimizer step ({summary['steps_per_epoch']:,} = one epoch)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend()


def plot_routers(router: "pd.DataFrame", d_model: int, path: str | Path) -> None:
    """Gate norm and load of every expert by layer, with each layer's mean and what an untrained router has."""
    load = relative_load(router).reset_index(name="relative")
    initial, means = initial_gate_norm(d_model), router.groupby("layer")["gate_norm"].mean()
    experts = {"marker": "o", "linestyle": "", "color": SKY, "alpha": 0.7}
    with saved_figure(path, 7.2, 3.2) as figure:
        norms, loads = figure.subplots(1, 2)
        norms.plot(router["layer"], router["gate_norm"], **experts, label="one expert")
        norms.plot(means.index, means, "D-", color=BLACK, label="mean")
        norms.axhline(initial, color=GREY, linestyle=":", label=f"expected at initialisation ({initial:.2f})")
        norms.set_ylabel("gate norm (L2 norm of router row)")
        loads.plot(load["layer"], load["relative"], **experts)
        loads.axhline(1, color=GREY, linestyle="--", label="uniform load")
        loads.set_ylabel("load / uniform load")
        for axes in (norms, loads):
            axes.set_xlabel("layer")
            axes.set_xticks(means.index)
        figure.legend(loc="outside upper center", ncols=4)


def plot_hit_rates(hits: "pd.DataFrame", num_experts: int, path: str | Path) -> None:
    """Hit rates of the replayed trace by capacity: every policy with one budget, LRU also with a share per layer."""
    one_budget, shares = hits[~hits["per_layer"]], hits[hits["per_layer"] & (hits["policy"] == "lru")]
    with saved_figure(path, 6.4, 3.9) as figure:
        axes = figure.subplots()
        axes.plot(
            [0, num_experts], [0, 1], color=GREY, linestyle=":", label="uniform routing, most of any online policy"
        )
        for policy, rows in one_budget.groupby("policy", sort=False):
            axes.plot(rows["capacity"], rows["hit_rate"], **POLICIES[policy], markerfacecolor="none")
        if not shares.empty:
            label = "LRU, an equal share per layer"
            axes.plot(shares["capacity"], shares["hit_rate"], "o--", color=SKY, label=label)
        axes.set_xlabel(f"experts held, of {num_experts}")
        axes.set_xlim(0, num_experts * 1.03)
        axes.set_ylabel("hit rate")
        axes.set_ylim(-0.03, 1.03)
        axes.legend(loc="lower right")


def plot_runs(swept: list[Record], path: str | Path) -> None:
    """Test perplexity against hit rate at a third of the experts, by policy, a point for each balance coefficient."""
    perplexities = [math.exp(run["test_loss"]) for run in swept]
    with saved_figure(path, 6.4, 3.6) as figure:
        axes = figure.subplots()
        unigram = math.exp(swept[0]["test_unigram_entropy"])
        axes.axhline(unigram, color=GREY, linestyle="--", linewidth=1, label="unigram perplexity of the test text")
        for policy, marker in (("lru", "o"), ("next_use", "s")):
            color, label = POLICIES[policy]["color"], POLICIES[policy]["label"]
            rates = [run["hit_rate"][policy] for run in swept]
            axes.plot(rates, perplexities, marker, color=color, label=label)
            uniform = swept[0]["uniform_hit_rate"][policy]
            axes.axvline(uniform, color=color, linestyle=":", linewidth=1, label=f"{label}, uniform routing")
            for number, (rate, run) in enumerate(zip(rates, swept, strict=True)):
                text, beside = f"λ {run['settings']['balance_coefficient']:g}", (-8, 6 if number % 2 else -13)
                at = rate, perplexities[number]
                axes.annotate(text, at, beside, textcoords="offset points", fontsize=7, color=color)
        axes.margins(x=0.12)
        axes.set_ylim(0.9 * min(perplexities), 1.12 * max(unigram, *perplexities))
        axes.set_xlabel(f"hit rate with {swept[0]['capacity']} of {swept[0]['experts']} experts held")
        axes.set_ylabel("perplexity of the test text")
        figure.legend(loc="outside right upper")
