"""The figures of the DWR report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaroute.reporting.dwr.findings import course, gate_norms_by_layer, relative_load
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, saved_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def plot_training(curve: "pd.DataFrame", summary: dict[str, Any], path: str | Path) -> None:
    """Training and validation loss by step, against the unigram entropy of the validation text."""
    import numpy as np

    steps_per_epoch, entropy = summary["steps_per_epoch"], summary["validation_unigram_entropy"]
    best = course(curve).best
    trained = curve[curve["step"] > 0]
    mark = f"best validation: {best['validation_loss']:.3f} at step {best['step']:,.0f}"
    every = 1 + len(curve) // 40  # markers that run into each other tell nothing
    with saved_figure(path, 5.4, 3.3) as figure:
        axes = figure.subplots()
        axes.axhline(entropy, color=GREY, linestyle=":", label="unigram entropy of the validation text")
        # A training loss is a mean over all steps since the previous row, which belongs to the middle of them.
        middles = curve["step"].rolling(2).mean().loc[trained.index]
        axes.plot(
            middles,
            trained["train_loss"],
            "s--",
            color=VERMILION,
            markevery=every,
            label="training, mean between validations",
        )
        axes.plot(curve["step"], curve["validation_loss"], "o-", color=BLUE, markevery=every, label="validation")
        axes.plot(best["step"], best["validation_loss"], "*", color=BLACK, markersize=11, label=mark)
        axes.set_xlabel(f"optimizer step ({steps_per_epoch:,} = one epoch)")
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        # Perplexity beside it: the same curve, another scale.
        right = axes.secondary_yaxis("right", functions=(np.exp, lambda value: np.log(np.maximum(value, 1e-9))))
        right.set_ylabel("perplexity")
        low, high = np.exp(axes.get_ylim())
        marks = [base * 10**power for power in range(12) for base in (1, 2, 5)]
        right.set_yticks([mark for mark in marks if low <= mark <= high])
        right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        right.spines["right"].set_visible(True)


def plot_gate_norms(router: "pd.DataFrame", path: str | Path) -> None:
    """Every expert's gate norm by layer, with minimum, mean and maximum."""
    by_layer = gate_norms_by_layer(router)
    experts = router["expert"].nunique()
    beside = (
        (router["expert"] - (experts - 1) / 2) * 0.5 / experts
    )  # side by side, or equal norms would hide each other
    with saved_figure(path, 2.6 + 0.4 * len(by_layer), 3.0) as figure:
        axes = figure.subplots()
        axes.plot(router["layer"] + beside, router["gate_norm"], "o", color=SKY, markersize=4, label="one expert")
        axes.plot(by_layer.index, by_layer["max"], "^--", color=BLUE, label="maximum")
        axes.plot(by_layer.index, by_layer["mean"], "D-", color=BLACK, label="mean")
        axes.plot(by_layer.index, by_layer["min"], "v:", color=VERMILION, label="minimum")
        axes.set_xticks(by_layer.index)
        axes.set_xlabel("layer")
        axes.set_ylabel("gate norm (L2 norm of router row)")
        figure.legend(loc="outside upper center", ncols=2)  # wherever it is inside, it may hide a line


def plot_expert_load(router: "pd.DataFrame", path: str | Path) -> None:
    """Every expert's load in units of the uniform share, as a map of layers and experts."""
    load = relative_load(router).unstack()
    layers, experts = load.shape
    with saved_figure(path, min(2 + 0.42 * experts, 9), 1 + 0.36 * layers) as figure:
        axes = figure.subplots()
        # One scale for all runs, from no tokens to twice the fair share: what is balanced looks balanced.
        image = axes.imshow(load, cmap="PuOr", vmin=0, vmax=2, aspect="auto")
        for (layer, expert), value in load.reset_index(drop=True).stack().items() if experts <= 32 else ():
            color = "white" if not 0.3 < value < 1.7 else "black"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(0, experts, 1 + experts // 40))
        axes.set_yticks(range(layers))
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.colorbar(image, label="load / uniform share", extend="max", ticks=[0, 0.5, 1, 1.5, 2])


def plot_hit_rates(simulated: "pd.DataFrame", num_experts: int, path: str | Path) -> None:
    """Hit rates of the replayed trace by capacity and policy under one budget, against MIN and uniform routing."""
    rates = simulated[~simulated["per_layer"]]
    with saved_figure(path, 5.4, 3.4) as figure:
        axes = figure.subplots()
        _capacity_axis(axes, num_experts)
        axes.plot(
            [0, num_experts], [0, 1], color=GREY, linestyle=":", label="c/N, the online bound\nof uniform routing"
        )
        for policy, rows in rates.groupby("policy", sort=False):
            style = _POLICIES[policy]
            axes.plot(rows["capacity"], rows["hit_rate"], **style, markerfacecolor="none")
            if policy == "lru":  # the page has a table of all
                style = {"color": style["color"], "linestyle": (0, (1, 2)), "linewidth": 1.0}
                axes.plot(rows["capacity"], rows["uniform_hit_rate"], **style, label="LRU, uniform routing")
        axes.set_ylabel("hit rate")
        axes.set_ylim(-0.03, 1.03)
        axes.legend(loc="lower right")


def plot_speed(timing: "pd.DataFrame", num_experts: int, path: str | Path) -> None:
    """Tokens per second relative to the resident model by capacity, nothing prefetched, with their range."""
    cells = timing[(timing["prefetch"] == "none") & (timing["page_cache"] == "warm")]
    policies = [policy for policy in ("lru", "next_use") if policy in set(cells["policy"])]
    with saved_figure(path, 4.4, 3.0) as figure:
        axes = figure.subplots()
        _capacity_axis(axes, num_experts)
        axes.axhline(1, color=GREY, linestyle=":", label="all experts resident")
        for number, policy in enumerate(policies or [cells["policy"].iloc[0]]):
            rows = cells[cells["policy"] == policy]
            ratio = rows["ratio_to_resident"]
            spread = [ratio - rows["ratio_lowest"], rows["ratio_highest"] - ratio]
            beside = 0.012 * number * num_experts  # or the ranges would hide each other
            style = {**_POLICIES[policy], "capsize": 2.5, "elinewidth": 0.9}
            axes.errorbar(rows["capacity"] + beside, ratio, yerr=spread, **style)
        axes.set_ylabel("decoding speed / resident")
        axes.set_ylim(bottom=0)
        axes.legend()


_POLICIES: dict[str, dict[str, Any]] = {
    "min": {"color": BLACK, "linestyle": "--", "label": "MIN, which knows the future"},
    "next_use": {"color": VERMILION, "linestyle": "-", "marker": "s", "label": "next use"},
    "weighted_lru": {"color": GREEN, "linestyle": "-.", "marker": "^", "label": "frequency-weighted LRU"},
    "lru": {"color": BLUE, "linestyle": "-", "marker": "o", "label": "LRU"},
    "lfu": {"color": ORANGE, "linestyle": ":", "marker": "v", "label": "LFU"},
    "pinned": {"color": PURPLE, "linestyle": ":", "marker": "D", "label": "pinned by frequency"},
}


def _capacity_axis(axes: "Axes", num_experts: int) -> None:
    axes.set_xlabel(f"capacity of the cache (experts of {num_experts})")
    axes.set_xlim(0, num_experts * 1.03)
