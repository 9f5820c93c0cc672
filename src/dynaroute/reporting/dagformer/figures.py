"""The figures of the DAGFormer report."""

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from dynaroute.analysis.statistics import Interval
from dynaroute.reporting.dagformer.results import MODES, PROTOCOLS, to_baseline
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, saved_figure
from dynaroute.reporting.inputs import Record

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Rectangle

MODE_STYLES = {
    "soft": {"color": BLUE, "linestyle": "-", "marker": "o", "label": "soft gates"},
    "hard": {"color": VERMILION, "linestyle": "--", "marker": "s", "label": "hard gates"},
}
NOT_DATA = "#F2F2F2"  # hatched as well: where no gate exists


def plot_adjacency(soft: "np.ndarray", hard: "np.ndarray", num_heads: int, path: str | Path) -> None:
    """Mean soft and hard gates [N, N] from every head (row) to every other (column), in blocks of layers."""
    layers = len(soft) // num_heads
    borders = [layer * num_heads - 0.5 for layer in range(layers + 1)]
    with saved_figure(path, 7.2, 3.9) as figure:
        for axes, gates, mode in zip(figure.subplots(1, 2, sharey=True), (soft, hard), MODES, strict=True):
            image = _gate_map(axes, gates, _later_layers(layers, num_heads))
            for border in borders[1:-1]:
                axes.axhline(border, color=GREY, linewidth=0.4, alpha=0.6)
                axes.axvline(border, color=GREY, linewidth=0.4, alpha=0.6)
            _outline_adjacent(axes, layers, num_heads)
            name_layers(axes, layers, num_heads)
            _name_axes(axes, f"{mode} gates", f"{num_heads} heads each")
        _explain_gates(figure, image, "mean gate")


def plot_density(soft: "np.ndarray", hard: "np.ndarray", path: str | Path) -> None:
    """Mean soft and hard gate from every layer (row) to every later one (column), [L, L] each."""
    layers = len(soft)
    with saved_figure(path, 7.2, 3.9) as figure:
        for axes, gates, mode in zip(figure.subplots(1, 2, sharey=True), (soft, hard), MODES, strict=True):
            image = _gate_map(axes, gates, _later_layers(layers, 1))
            for source in range(layers):
                for target in range(source + 1, layers):
                    value = gates[source, target]
                    axes.text(
                        *(target, source, f"{value:.2f}".removeprefix("0")),
                        **{"ha": "center", "va": "center", "fontsize": 8 if layers <= 8 else 5},
                        color="black" if value > 0.55 else "white",
                    )
            _outline_adjacent(axes, layers, 1)
            axes.set_xticks(range(0, layers, 1 + layers // 20))
            axes.set_yticks(range(0, layers, 1 + layers // 20))
            _name_axes(axes, f"{mode} gates", "mean over heads")
        _explain_gates(figure, image, "mean gate = density")


def _later_layers(layers: int, heads: int) -> "np.ndarray":
    import numpy as np

    layer = np.arange(layers * heads) // heads
    return layer[None, :] > layer[:, None]


def _gate_map(axes: "Axes", gates: "np.ndarray", valid: "np.ndarray") -> "AxesImage":
    import numpy as np

    mark_no_connection(axes, len(gates))
    # From 0 to 1 whatever the data: what is open looks open. One colour map, read in greyscale as well.
    image = axes.imshow(np.where(valid, gates, np.nan), cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def mark_no_connection(axes: "Axes", size: int) -> None:
    """Hatches a map of size x size, to be drawn over where there are values."""
    axes.add_patch(_not_data((-0.5, -0.5), size, size))


def name_layers(axes: "Axes", layers: int, num_heads: int) -> None:
    """Ticks in the middle of each layer's heads, or of some layers' if there are many."""
    step = 1 + layers // 12
    middles = [layer * num_heads + (num_heads - 1) / 2 for layer in range(0, layers, step)]
    axes.set_xticks(middles, range(0, layers, step))
    axes.set_yticks(middles, range(0, layers, step))


def _not_data(corner: tuple[float, float], width: float, height: float) -> "Rectangle":
    from matplotlib.patches import Rectangle

    hatch = {"hatch": "////", "edgecolor": "#BDBDBD"}
    return Rectangle(corner, width, height, facecolor=NOT_DATA, linewidth=0, zorder=-1, **hatch)


def _outline_adjacent(axes: "Axes", layers: int, heads: int) -> None:
    from matplotlib.patches import Rectangle

    for layer in range(layers - 1):
        corner = ((layer + 1) * heads - 0.5, layer * heads - 0.5)
        axes.add_patch(Rectangle(corner, heads, heads, fill=False, edgecolor=VERMILION, linewidth=1.6, zorder=4))


def _name_axes(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(f"target layer ({unit})")
    axes.set_ylabel(f"source layer ({unit})")
    axes.label_outer()


def _explain_gates(figure: "Figure", image: "AxesImage", label: str) -> None:
    from matplotlib.patches import Rectangle

    figure.colorbar(image, ax=figure.axes, label=label, shrink=0.8, pad=0.02)
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=VERMILION, linewidth=1.6), _not_data((0, 0), 1, 1)]
    names = ["adjacent layers (the rest skip layers)", "no connection: target not in a later layer"]
    figure.legend(handles, names, loc="outside lower center", ncols=2)


def plot_nll(curves: dict[str, "pd.DataFrame"], path: str | Path) -> None:
    """Validation NLL by step with soft and hard gates, against the baseline; a panel for each variant."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with saved_figure(path, 0.4 + 2.4 * columns, 0.5 + 1.8 * rows) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (name, curve) in zip(panels, curves.items(), strict=False):
            steps = curve["step"]
            axes.plot(steps, curve["validation_nll_baseline"], color=BLACK, linestyle=":", label="baseline")
            for mode, style in MODE_STYLES.items():
                axes.plot(steps, curve[f"validation_nll_{mode}"], markevery=1 + len(curve) // 12, **style)
            axes.set_title(name)
            axes.ticklabel_format(axis="y", useOffset=False)
        for axes in panels[len(curves) :]:
            axes.remove()
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel("validation NLL (nats per token)", fontsize=9)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def plot_schedules(curves: dict[str, "pd.DataFrame"], starts: dict[str, int], path: str | Path) -> None:
    """Temperature and lambda by step, as recorded at validations; equal schedules are one line.

    `starts`: the step at which each begins; what continues another variant begins at its end.
    """
    with saved_figure(path, 7.2, 3.0) as figure:
        tau, weight = figure.subplots(1, 2)
        for axes, name in ((tau, "tau"), (weight, "lambda")):
            lines: dict[tuple[float, ...], list[str]] = {}
            for variant, curve in curves.items():
                steps = curve["step"] + starts[variant]
                lines.setdefault((*steps, *curve[f"validation_{name}"]), []).append(variant)
            for (points, variants), style in zip(lines.items(), itertools.cycle(_LINES)):
                half = len(points) // 2
                more = f" and {len(variants) - 1} more" if len(variants) > 1 else ""
                axes.plot(points[:half], points[half:], markevery=1 + half // 12, label=variants[0] + more, **style)
            axes.set_xlabel("optimizer step")
            axes.legend(handlelength=3)
        tau.set_yscale("log")
        tau.yaxis.set_major_formatter("{x:g}")
        tau.set_ylabel("temperature tau")
        weight.set_ylabel("lambda (weight of mean A)")


def plot_gate_gradients(curves: dict[str, "pd.DataFrame"], named: list[str], alarm: float, path: str | Path) -> None:
    """Gradient that reaches the gates, and the gates' slope with its alarm, by step; what is not named is grey."""
    with saved_figure(path, 7.2, 3.4) as figure:
        gradient, slope = figure.subplots(1, 2)
        for axes, column in ((gradient, "train_gate_gradient"), (slope, "train_gate_slope")):
            others = [name for name in curves if name not in named]
            for name in others:
                label = "the other variants" if name == others[0] else None
                axes.plot(*_trained(curves[name], column), color="#BDBDBD", linewidth=0.8, label=label)
            for name, style in zip(named, itertools.cycle(_LINES), strict=False):
                steps, values = _trained(curves[name], column)
                axes.plot(steps, values, markevery=1 + len(steps) // 12, label=name, **style)
            axes.set_xlabel("optimizer step")
        gradient.set_ylim(bottom=0)
        slope.set_yscale("log")
        gradient.set_ylabel("gradient norm at the gates")
        slope.set_ylabel("mean slope dA/dZ of the gates")
        slope.axhline(alarm, color=BLACK, linestyle=":", linewidth=0.9, label="alarm")
        figure.legend(*slope.get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=3)


def plot_variants(evaluations: dict[str, Record], path: str | Path) -> None:
    """Difference in NLL to the baseline with its 95 % interval for every variant, mode and protocol."""
    names = list(evaluations)
    found = {
        (protocol, mode): [to_baseline(evaluation, mode, protocol) for evaluation in evaluations.values()]
        for protocol in PROTOCOLS
        for mode in MODES
    }
    sizes = [abs(one.mean) for intervals in found.values() for one in intervals]
    # What is far from all others (such as the layer-0 bug) would flatten them: it is written at the margin instead.
    limit = 10 * statistics.quantiles(sizes, n=4)[-1]
    with saved_figure(path, 7.2, 1.3 + 0.27 * len(names)) as figure:
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, protocol in zip(panels, PROTOCOLS, strict=True):
            for row in range(0, len(names), 2):  # bands lead the eye from name to interval
                axes.axhspan(row - 0.5, row + 0.5, color="#F5F5F5", zorder=0)
            axes.axvline(0, color=BLACK, linewidth=0.9, label="baseline")
            for mode, beside in zip(MODES, (-0.18, 0.18), strict=True):
                _intervals(axes, found[protocol, mode], beside, limit, MODE_STYLES[mode])
            axes.set_title(f"{protocol} protocol")
            axes.set_xlabel("NLL minus baseline (nats per token)")
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _intervals(axes: "Axes", found: list[Interval], beside: float, limit: float, style: dict) -> None:
    """Means with their intervals, a row each; those beyond the limit as numbers at the margin."""
    shown = [(row + beside, one) for row, one in enumerate(found) if abs(one.mean) <= limit]
    means = [one.mean for _, one in shown]
    spread = [[one.mean - one.low for _, one in shown], [one.high - one.mean for _, one in shown]]
    style = {**style, "linestyle": "none", "markersize": 3, "capsize": 2.5, "elinewidth": 0.9}
    axes.errorbar(means, [row for row, _ in shown], xerr=spread, **style)
    for row, one in enumerate(found):
        if abs(one.mean) > limit:
            side = {"x": 0.98, "s": f"{one.mean:+.2g} →", "ha": "right"}
            if one.mean < 0:
                side = {"x": 0.02, "s": f"← {one.mean:+.2g}", "ha": "left"}
            transform = axes.get_yaxis_transform()  # x in parts of the panel's width
            axes.text(y=row + beside, **side, va="center", fontsize=7, color=style["color"], transform=transform)


_LINES = [
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
    {"color": BLACK, "linestyle": "-.", "marker": "D"},
    {"color": GREEN, "linestyle": ":", "marker": "^"},
    {"color": ORANGE, "linestyle": "-", "marker": "v"},
    {"color": PURPLE, "linestyle": "--", "marker": "P"},
    {"color": SKY, "linestyle": "-.", "marker": "X"},
]


def _trained(curve: "pd.DataFrame", column: str) -> "tuple[pd.Series, pd.Series]":
    """Steps and values of a column; a mean since the previous row belongs to the middle of those steps."""
    trained = curve.index[curve["step"] > 0]
    return curve["step"].rolling(2).mean().loc[trained], curve.loc[trained, column]
