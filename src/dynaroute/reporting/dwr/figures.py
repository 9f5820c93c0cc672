"""The figures of the DWR reports."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaroute.reporting.dwr.findings import curve, gate_norms
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, saved_figure
from dynaroute.reporting.inputs import Record

if TYPE_CHECKING:
    import pandas as pd

LOAD = 0.3  # of the uniform load; with less, an expert counts as hardly used
POLICIES: dict[str, dict[str, Any]] = {  # those that figures show; tables have all
    "min": {"color": BLACK, "linestyle": "--", "label": "MIN, which knows the future"},
    "token_path": {"color": PURPLE, "linestyle": "-", "marker": "D", "label": "token path"},
    "next_use": {"color": VERMILION, "linestyle": "-.", "marker": "s", "label": "next use"},
    "least_stale": {"color": GREEN, "linestyle": ":", "marker": "^", "label": "Least-Stale"},
    "lru": {"color": BLUE, "linestyle": "-", "marker": "o", "label": "LRU"},
}


def plot_training(seeds: list[Record], path: str | Path) -> None:
    """Training and validation loss by epoch, the reference's in front of those of other seeds."""
    with saved_figure(path, 7.6, 3.4) as figure:
        axes, closer = figure.subplots(1, 2, width_ratios=(2, 1))
        for run in reversed(seeds):
            alpha = 1 if run is seeds[0] else 0.3
            epochs = [row["step"] * run["epochs"] / run["steps"] for row in run["losses"]]
            losses = [row["train_loss"] for row in run["losses"]]
            axes.plot(epochs, losses, color=ORANGE, linewidth=0.7, alpha=alpha, label="training, every tenth step")
            rows = curve(run)
            middles = rows["epoch"].rolling(2).mean()  # of the steps whose mean a training loss is
            axes.plot(
                middles, rows["train_loss"], "s--", color=VERMILION, alpha=alpha, label="training, mean of an epoch"
            )
            axes.plot(rows["epoch"], rows["validation_loss"], "o-", color=BLUE, alpha=alpha, label="validation")
            late = rows[rows["epoch"] >= rows["epoch"].max() / 3]
            closer.plot(late["epoch"], late["validation_loss"], "o-", color=BLUE, alpha=alpha)
            closer.plot(run["best_epoch"], run["validation_loss"], "*", color=BLACK, markersize=11, alpha=alpha)
        best = seeds[0]["best_epoch"], seeds[0]["validation_loss"]
        axes.plot(*best, "*", color=BLACK, markersize=11, label=f"best validation: epoch {best[0]:.3g}")
        closer.set_title("validation, closer")
        for panel in (axes, closer):
            panel.set_xlabel("epoch")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(handles=axes.lines[-4:], title="lighter: other seeds" if len(seeds) > 1 else None)


def plot_gate_norms(run: Record, path: str | Path) -> None:
    """Least, mean and largest gate norm of each layer by epoch, over the range at initialisation."""
    epochs = [row["epoch"] for row in run["history"]]
    least, mean, most = (gate_norms(run, measure) for measure in ("min", "mean", "max"))  # [rows, L]
    with saved_figure(path, 7.2, 2.6) as figure:
        panels = figure.subplots(1, mean.shape[1], sharey=True, squeeze=False)[0]
        for layer, axes in enumerate(panels):
            untrained = least[0, layer], most[0, layer]
            axes.axhspan(*untrained, color=GREY, alpha=0.3, linewidth=0, label="least to largest at initialisation")
            band = least[:, layer], most[:, layer]
            axes.fill_between(epochs, *band, color=SKY, alpha=0.5, linewidth=0, label="least to largest")
            axes.plot(epochs, mean[:, layer], color=BLUE, label="mean over experts")
            axes.set_title(f"layer {layer}")
            axes.set_xlabel("epoch")
        panels[0].set_ylabel("gate norm")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def plot_hit_rates(hits: "pd.DataFrame", num_experts: int, path: str | Path) -> None:
    """Hit rates of the replayed trace by capacity: POLICIES with one budget, LRU also with a share per layer."""
    one_budget, shares = hits[~hits["per_layer"]], hits[hits["per_layer"] & (hits["policy"] == "lru")]
    with saved_figure(path, 6.4, 3.9) as figure:
        axes = figure.subplots()
        axes.plot([0, num_experts], [0, 1], color=GREY, linestyle=":", label="online policies at most, uniform routing")
        for policy, style in POLICIES.items():
            rows = one_budget[one_budget["policy"] == policy]
            if not rows.empty:
                axes.plot(rows["capacity"], rows["hit_rate"], **style, markerfacecolor="none")
        if not shares.empty:
            label = "LRU, an equal share per layer"
            axes.plot(shares["capacity"], shares["hit_rate"], "x--", color=SKY, label=label)
        axes.set_xlabel(f"experts held, of {num_experts}")
        axes.set_xlim(0, num_experts * 1.03)
        axes.set_ylabel("hit rate")
        axes.set_ylim(-0.03, 1.03)
        axes.legend(loc="lower right")


def plot_peers(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Memory against speed with a warm cache, of rows of benchmark_hub_moe; bars from slowest to fastest round."""
    styles = {  # by what a name begins with
        "ours, shards": (BLUE, "o"), "ours, bf16 export": (SKY, "s"), "ours, int8": (GREEN, "D"),
        "ours, all resident in bf16": (BLUE, "P"), "ours, all resident in int8": (GREEN, "X"),
        "llama.cpp": (ORANGE, "^"), "transformers": (VERMILION, "v"), "accelerate": (PURPLE, "<"),
    }  # fmt: skip
    with saved_figure(path, 6.4, 3.4) as figure:
        axes = figure.subplots()
        for start, (color, marker) in styles.items():
            own = [row for row in rows if row["name"].startswith(start) and "warm" in row and row["threads"] == 1]
            own.sort(key=lambda row: row["memory_bytes"])
            if own:
                speed = [row["warm"] for row in own]
                errors = [[row["warm"] - row["lowest"] for row in own], [row["highest"] - row["warm"] for row in own]]
                memory = [row["memory_bytes"] / 1e9 for row in own]
                style = {"fmt": f"{marker}:", "color": color, "markeredgecolor": BLACK, "markeredgewidth": 0.6}
                axes.errorbar(memory, speed, errors, **style, markersize=7, capsize=2, label=start)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=0)
        axes.set_xlabel("memory limit, or without one the most that was used (GB)")
        axes.set_ylabel("tokens/s, warm")
        figure.legend(loc="outside right upper")


def plot_runs(swept: list[Record], seeds: list[Record], locality: "pd.DataFrame | None", path: str | Path) -> None:
    """Test perplexity against the hit rate of LRU, a point for each balance coefficient, lighter for other seeds.

    With the benchmark of training for the cache, a point for each of its settings instead, hollow if an expert is
    hardly used, with a cross where cache-aware routing takes it.
    """
    first = swept[0]
    with saved_figure(path, 7.2, 3.8) as figure:
        axes = figure.subplots()
        if locality is None:
            for run in (*swept, *seeds[1:]):
                own = run in swept
                point = run["hit_rate"]["lru"], math.exp(run["test_loss"])
                axes.plot(*point, "o", color=BLUE, alpha=1 if own else 0.3)
                if own:
                    text = f"λ {run['settings']['balance_coefficient']:g}"
                    axes.annotate(text, point, (0, 6), textcoords="offset points", ha="center", fontsize=7)
        else:
            exact = locality[locality["routing"] == "exact"].set_index("setting")
            low, high = exact.loc["reference", ["perplexity_low", "perplexity_high"]]
            near = exact["perplexity"] < high + 2 * (high - low)
            for number, (name, row) in enumerate(exact[near].sort_values("lru_third").iterrows()):
                color = VERMILION if str(name).startswith("recipe") else BLUE
                fill = color if row["smallest_load"] >= LOAD else "white"
                point = row["lru_third"], row["perplexity"]
                axes.plot(*point, "o", markerfacecolor=fill, color=color, markersize=9 if name == "recipe" else 6)
                place = {"xytext": (0, -13 if number % 2 else 7), "textcoords": "offset points", "ha": "center"}
                place["bbox"] = {"fc": "white", "lw": 0, "pad": 0.5, "alpha": 0.7}
                text = str(name).replace("recipe_", "… ").replace("_", " ").replace("lambda", "λ")
                axes.annotate(text, point, **place, fontsize=7, color=color)
            axes.axhspan(low, high, color=GREY, alpha=0.2, label="reference, 95 % interval over seeds")
            axes.axvline(2 * exact.loc["reference", "lru_third"], color=BLACK, linewidth=1, label="twice its hits")
            aware = locality[locality["routing"] == "inexact 1"].set_index("setting")
            for name in ("reference", "recipe"):
                (x, y), (to_x, to_y) = (rows.loc[name, ["lru_third", "perplexity"]] for rows in (exact, aware))
                label = "cache-aware routing, α = 1 (inexact)" if name == "reference" else None
                axes.plot([x, to_x], [y, to_y], "x:", color=GREEN, markersize=8, markevery=[1], label=label)
            axes.plot(
                [], [], "o", markerfacecolor="white", color=BLUE, label=f"an expert has less than {LOAD:g} of the load"
            )
            for name, value in exact["perplexity"][~near].items():
                axes.plot([], [], " ", label=f"above the frame: {name}, {value:.0f}")
        axes.axvline(
            first["uniform_hit_rate"]["lru"], color=BLUE, linestyle=":", linewidth=1, label="LRU, uniform routing"
        )
        axes.margins(x=0.12, y=0.2)
        axes.set_title(f"unigram perplexity of the test text: {math.exp(first['test_unigram_entropy']):.0f}")
        axes.set_xlabel(f"hit rate of LRU with {first['capacity']} of {first['experts']} experts held")
        axes.set_ylabel("perplexity of the test text")
        figure.legend(loc="outside lower center", ncols=2)
