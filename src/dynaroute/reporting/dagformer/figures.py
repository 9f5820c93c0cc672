"""The figures of the DAGFormer report."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.config.dagformer import PROTOCOLS
from dynaroute.reporting.dagformer.page import ORDERS
from dynaroute.reporting.dagformer.results import CONTROL, DATA, MAIN, Comparisons, Variant
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, saved_figure
from dynaroute.reporting.inputs import read_checkpoint

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

LINES = [
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
    {"color": BLACK, "linestyle": "-.", "marker": "D"},
    {"color": GREEN, "linestyle": ":", "marker": "^"},
    {"color": ORANGE, "linestyle": "-", "marker": "v"},
    {"color": PURPLE, "linestyle": "--", "marker": "P"},
    {"color": SKY, "linestyle": "-.", "marker": "X"},
]
MINUS_BASELINE = "NLL minus baseline (nats per token)"


class Wirings(NamedTuple):
    """One variant's wirings of the held-out texts, by the window protocol."""

    mean_hard: "np.ndarray"  # [N, N], over texts
    variance: "np.ndarray"  # [N, N], of soft gates over texts
    distances: "np.ndarray"  # of all pairs of texts
    same_text: "np.ndarray"  # of each text to its own prefix
    num_heads: int


def read_wirings(name: str) -> Wirings:
    """Reads what figures show of a variant's wirings.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    gates, state = read_checkpoint(DATA / "eval" / name / "gates.safetensors")
    tensors, _ = read_checkpoint(DATA / "analysis" / name / "wirings.safetensors")
    found = [tensors[key].numpy() for key in ("variance", "distances", "same_text")]
    return Wirings(gates["window.mean_hard"].numpy(), *found, state["num_heads"])


def plot_wiring(wirings: Wirings, path: str | Path) -> None:
    """Mean hard gates over texts: from every head (row) to every other (column), and from layer to layer."""
    with saved_figure(path, 7.2, 3.9) as figure:
        heads, layers = figure.subplots(1, 2)
        image = _map(heads, wirings.mean_hard, wirings.num_heads, vmin=0, vmax=1)
        heads.set_title(f"from head to head ({wirings.num_heads} in each layer)")
        figure.colorbar(image, ax=heads, label="share of texts whose gate is open", shrink=0.8)
        means = _by_layer_pair(wirings.mean_hard, wirings.num_heads)
        image = _map(layers, means, 1)  # on a scale of its own: what differs from pair to pair is seen
        layers.set_title("from layer to layer")
        for source, target in itertools.combinations(range(len(means)), 2):
            value, (low, high) = means[source, target], image.get_clim()
            style = {"ha": "center", "va": "center", "fontsize": 8 if len(means) <= 8 else 5}
            color = "black" if value > (low + high) / 2 else "white"
            layers.text(target, source, f"{value:.2f}".removeprefix("0"), color=color, **style)
        figure.colorbar(image, ax=layers, label="density", shrink=0.8)


def plot_distances(wirings: Wirings, path: str | Path) -> None:
    """X1: variance of soft gates over texts by layer pair, and distances of wirings of different texts and the same."""
    with saved_figure(path, 7.2, 3.3) as figure:
        gates, distances = figure.subplots(1, 2)
        image = _map(gates, _by_layer_pair(wirings.variance, wirings.num_heads), 1)
        gates.set_title("variance of a gate over texts")
        figure.colorbar(image, ax=gates, label="mean over heads", shrink=0.8)
        shown = {"different texts": wirings.distances, "same text: window, prefix": wirings.same_text}
        most = max(1e-6, *(float(values.max()) for values in shown.values()))
        for (label, values), color, hatch in zip(shown.items(), (BLUE, ORANGE), ("", "////"), strict=True):
            style = {"color": color, "alpha": 0.55, "hatch": hatch, "edgecolor": BLACK, "linewidth": 0.4}
            weights = [1 / len(values)] * len(values)
            distances.hist(values, bins=25, range=(0, most), weights=weights, label=label, **style)
        distances.set_title("distance of two wirings")
        distances.set_xlabel("weighted Jaccard distance")
        distances.set_ylabel("share of pairs")
        distances.legend()


def plot_nll(curves: dict[str, "pd.DataFrame"], path: str | Path) -> None:
    """Validation NLL with soft and hard gates minus the baseline's, by step; a panel for each variant, one scale."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with saved_figure(path, 0.4 + 2.25 * columns, 0.7 + 1.6 * rows) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, (name, curve) in zip(panels, curves.items(), strict=False):
            axes.axhline(0, color=BLACK, linestyle=":", linewidth=0.9, label="baseline")
            for mode, style in zip(("soft", "hard"), LINES, strict=False):
                difference = curve[f"validation_nll_{mode}"] - curve["validation_nll_baseline"]
                axes.plot(curve["step"], difference, markevery=1 + len(curve) // 12, label=f"{mode} gates", **style)
            axes.set_title(name)
        for axes in panels[len(curves) :]:
            axes.remove()
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel("validation NLL minus baseline", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def plot_gate_gradients(curves: dict[str, "pd.DataFrame"], named: list[str], alarm: float, path: str | Path) -> None:
    """Gradient that reaches the gates, and the gates' slope with its alarm, by step; variants not named are grey."""
    with saved_figure(path, 7.2, 3.4) as figure:
        gradient, slope = figure.subplots(1, 2)
        for axes, column in ((gradient, "train_gate_gradient"), (slope, "train_gate_slope")):
            others = [name for name in curves if name not in named]
            for name in others:
                label = "the other variants" if name == others[0] else None
                axes.plot(*_trained(curves[name], column), color="#BDBDBD", linewidth=0.8, label=label)
            for name, style in zip(named, itertools.cycle(LINES), strict=False):
                steps, values = _trained(curves[name], column)
                axes.plot(steps, values, markevery=1 + len(steps) // 12, label=name, **style)
            axes.set_xlabel("optimizer step")
        gradient.set_ylim(bottom=0)
        slope.set_yscale("log")
        gradient.set_ylabel("gradient norm at the gates")
        slope.set_ylabel("mean slope dA/dZ of the gates")
        slope.axhline(alarm, color=BLACK, linestyle=":", linewidth=0.9, label="alarm")
        figure.legend(*slope.get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=3)


def plot_variants(comparisons: Comparisons, labels: dict[str, str], path: str | Path) -> None:
    """Hard NLL minus baseline with its 95 % interval for every variant, by both protocols; P1's seeds as a band."""
    hard = comparisons.differences.xs("hard", level="mode")
    sizes = hard["difference"].abs()
    # What is far from all others (such as the layer-0 bug) would flatten them: it is written at the margin instead.
    limit = 10 * float(sizes.quantile(0.75))
    with saved_figure(path, 7.2, 1.3 + 0.2 * len(labels)) as figure:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, protocol in zip(panels, PROTOCOLS, strict=True):
            if len(comparisons.seeds["seeds"]) > 1:
                seeds = comparisons.seeds[protocol]["hard"]["differences"].values()
                axes.axvspan(min(seeds), max(seeds), color=SKY, alpha=0.35, label="range of P1's seeds")
            axes.axvline(0, color=BLACK, linewidth=0.9, label="baseline")
            rows = hard.xs(protocol, level="protocol").loc[list(labels)].reset_index()
            near = rows[rows["difference"].abs() <= limit]
            spread = [near["difference"] - near["low"], near["high"] - near["difference"]]
            style = {"color": BLUE, "linestyle": "none", "marker": "o", "markersize": 3, "capsize": 2.5}
            axes.errorbar(near["difference"], near.index, xerr=spread, elinewidth=0.9, **style)
            for row, value in rows.loc[rows["difference"].abs() > limit, "difference"].items():
                transform = axes.get_yaxis_transform()  # x in parts of the panel's width
                side = {"x": 0.98, "ha": "right"} if value > 0 else {"x": 0.02, "ha": "left"}
                axes.text(y=row, s=f"{value:+.2g}", va="center", fontsize=7, color=BLUE, transform=transform, **side)
            axes.set_title(f"{protocol} protocol")
        panels[0].set_yticks(range(len(labels)), labels.values())
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.supxlabel(f"hard {MINUS_BASELINE}", fontsize=9)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def plot_edges_closed(
    removal: "pd.DataFrame", variants: dict[str, Variant], comparisons: Comparisons, path: str | Path
) -> None:
    """Hard NLL minus baseline by the share of edges closed: two orders of removal with 95 % intervals, and variants.

    The order by expected gain is left out: it is so much worse that nothing else could be seen.
    """
    with saved_figure(path, 6.0, 3.8) as figure:
        axes = figure.subplots()
        for order, style in zip(("random", "least_gradient"), LINES, strict=False):
            own = removal[removal["order"] == order].sort_values("fraction")
            axes.plot(own["fraction"], own["mean"], label=f"edges closed, {ORDERS[order]}", **style)
            axes.fill_between(own["fraction"], own["low"], own["high"], color=style["color"], alpha=0.12, linewidth=0)
        points = {
            name: (1 - variant.evaluation["window"]["density_hard"], comparisons.hard.loc[name, "difference"])
            for name, variant in variants.items()
            if variant.knobs["base_lr"] == 0
        }
        for name, style in ((MAIN, {"marker": "D", "color": BLACK}), (CONTROL, {"marker": "*", "color": GREEN})):
            if name in points:
                axes.plot(*points.pop(name), linestyle="none", label=name, **style)
        if points:
            axes.plot(*zip(*points.values(), strict=True), "x", color=GREY, label="other variants")
        axes.axhline(0, color=BLACK, linewidth=0.8)
        axes.set_xlabel("share of edges closed")
        axes.set_ylabel(f"hard {MINUS_BASELINE}")
        axes.legend()


def _trained(curve: "pd.DataFrame", column: str) -> "tuple[pd.Series, pd.Series]":
    """Steps and values of a column; a mean since the previous row belongs to the middle of those steps."""
    trained = curve.index[curve["step"] > 0]
    return curve["step"].rolling(2).mean().loc[trained], curve.loc[trained, column]


def _by_layer_pair(gates: "np.ndarray", heads: int) -> "np.ndarray":
    """Mean gate from each layer to each other, [L, L] from [N, N]."""
    layers = len(gates) // heads
    return gates.reshape(layers, heads, layers, heads).mean((1, 3))


def _map(axes: "Axes", values: "np.ndarray", heads: int, **scale: float) -> "AxesImage":
    """Values from every head or layer (row) to every other (column), in blocks of layers; hatched: no connection."""
    import numpy as np
    from matplotlib.patches import Rectangle

    layers = len(values) // heads
    layer = np.arange(len(values)) // heads
    hatch = {"hatch": "////", "edgecolor": "#BDBDBD", "facecolor": "#F2F2F2", "linewidth": 0, "zorder": -1}
    axes.add_patch(Rectangle((-0.5, -0.5), len(values), len(values), **hatch))
    shown = np.where(layer[None] > layer[:, None], values, np.nan)
    image = axes.imshow(shown, cmap="cividis", interpolation="nearest", **scale)  # read in greyscale as well
    axes.grid(False)
    axes.tick_params(length=0)
    for border in (np.arange(1, layers) * heads - 0.5) if heads > 1 else ():
        axes.axhline(border, color=GREY, linewidth=0.4, alpha=0.6)
        axes.axvline(border, color=GREY, linewidth=0.4, alpha=0.6)
    step = 1 + layers // 12
    middles = [one * heads + (heads - 1) / 2 for one in range(0, layers, step)]
    axes.set_xticks(middles, range(0, layers, step))
    axes.set_yticks(middles, range(0, layers, step))
    axes.set_xlabel("target layer")
    axes.set_ylabel("source layer")
    return image
