"""The figures of the analyses X1, X2 and X3."""

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dynaroute.analysis.statistics import Interval
from dynaroute.reporting.dagformer.analyses import Analyses, Wirings
from dynaroute.reporting.dagformer.figures import mark_no_connection, name_layers
from dynaroute.reporting.dagformer.sensitivity import ORDERS, TEXTS
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, ORANGE, VERMILION, saved_figure
from dynaroute.reporting.tables import count

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_STYLES = [
    {"color": BLACK, "linestyle": ":", "marker": "D"},
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
]


def plot_variance(wirings: Wirings, path: str | Path) -> None:
    """X1: variance of every soft gate over texts, and distances of wirings of different texts and of the same."""
    with saved_figure(path, 7.2, 3.3) as figure:
        gates, distances = figure.subplots(1, 2)
        variance = wirings.variance.numpy()
        image = _map(gates, variance, wirings.num_heads, cmap="cividis", vmin=0, vmax=max(variance.max(), 1e-6))
        gates.set_title("variance of each gate")
        figure.colorbar(image, ax=gates, label="variance over texts", shrink=0.8)
        shown = {"different texts": wirings.distances.numpy(), "same text: window, prefix": wirings.same_text.numpy()}
        most = max(1e-6, *(float(values.max()) for values in shown.values()))
        for (label, values), color, hatch in zip(shown.items(), (BLUE, ORANGE), ("", "////"), strict=True):
            style = {"color": color, "alpha": 0.55, "hatch": hatch, "edgecolor": BLACK, "linewidth": 0.4}
            weights = [1 / len(values)] * len(values)
            distances.hist(values, bins=25, range=(0, most), weights=weights, label=label, **style)
        distances.set_title("distance of two wirings")
        distances.set_xlabel("weighted Jaccard distance")
        distances.set_ylabel("share of pairs")
        distances.legend()


def plot_domains(wirings: Wirings, path: str | Path) -> None:
    """X2: mean soft gates of each source less their mean over sources; a panel for each source."""
    sources = wirings.sources
    columns = max(1, min(4, len(sources)))
    rows = max(1, -(-len(sources) // columns))
    with saved_figure(path, 0.9 + 1.75 * columns, 1.0 + 1.75 * rows) as figure:
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        if wirings.mean_by_source is None:
            panels[0].set_axis_off()
            panels[0].text(0, 0.5, "the test split has one source")
            return
        apart = (wirings.mean_by_source - wirings.mean_by_source.mean(0)).numpy()
        most = max(float(abs(apart).max()), 1e-6)
        for axes, source, values in zip(panels, sources, apart, strict=False):
            image = _map(axes, values, wirings.num_heads, cmap="PuOr", vmin=-most, vmax=most)
            axes.set_title(source)
            axes.label_outer()
        for axes in panels[len(sources) :]:
            axes.remove()
        figure.colorbar(image, ax=figure.axes, label="gate less mean over sources", shrink=0.8, pad=0.02)


def plot_sensitivity(analyses: Analyses, path: str | Path) -> None:
    """X3: size of gradients by layer pair, and the change of NLL without each layer pair and without each head."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    layers, heads = (analyses.sensitivity[f"num_{name}"] for name in ("layers", "heads"))
    with saved_figure(path, 7.2, 3.4) as figure:
        gradients, pairs, single = figure.subplots(1, 3)
        size, change = (np.full((layers, layers), np.nan) for _ in range(2))
        for table, values, column in ((analyses.gradients, size, "size"), (analyses.layer_pairs, change, "difference")):
            values[table["source"].to_numpy(int), table["target"].to_numpy(int)] = table[column]
        by_head = np.full((layers, heads), np.nan)
        by_head[analyses.heads["layer"].to_numpy(int), analyses.heads["head"].to_numpy(int)] = analyses.heads[
            "difference"
        ]
        largest = max(np.nanmax(size), 1e-12)
        power = math.floor(math.log10(largest))  # in the label: matplotlib would print the factor across it
        image = _map(gradients, size / 10**power, 1, cmap="cividis", vmin=0, vmax=largest / 10**power)
        label = f"mean |dNLL/dA| at A = 1 ($10^{{{power}}}$)"
        figure.colorbar(image, ax=gradients, location="bottom", label=label, ticks=MaxNLocator(4))
        gradients.set_title("gradient of a gate")
        most = max(np.nanmax(np.abs(change)), np.nanmax(np.abs(by_head)), 1e-6)
        _map(pairs, change, 1, cmap="PuOr", vmin=-most, vmax=most)
        pairs.set_title("without a layer pair")
        image = single.imshow(by_head, cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest")
        single.grid(False)
        single.set_xlabel("head")
        single.set_ylabel("layer")
        single.set_title("without a head")
        figure.colorbar(image, ax=[pairs, single], location="bottom", label="change of NLL (nats per token)")
        for axes in (gradients, pairs):
            axes.set_xticks(range(0, layers, 1 + layers // 8))
            axes.set_yticks(range(0, layers, 1 + layers // 8))


def plot_removal(analyses: Analyses, path: str | Path) -> None:
    """X3: the change of NLL by the fraction of edges removed, and by gates optimised on one window."""
    with saved_figure(path, 7.2, 3.0) as figure:
        removal, oracle = figure.subplots(1, 2, width_ratios=[3, 2])
        for (order, words), style in zip(ORDERS.items(), _STYLES, strict=True):
            own = analyses.removal[analyses.removal["order"] == order].sort_values("fraction")
            removal.plot(own["fraction"], own["difference"], label=words, **style)
            removal.fill_between(
                own["fraction"], own["low"], own["high"], color=style["color"], alpha=0.15, linewidth=0
            )
        removal.axhline(0, color=BLACK, linewidth=0.8)
        removal.set_xlabel("fraction of edges removed")
        removal.set_ylabel("NLL less that at A = 1\n(nats per token)")
        removal.set_title(f"removal, {count(int(analyses.removal['n'].iloc[0]), 'window')}")
        removal.legend()
        rows = [analyses.sensitivity["oracle"][text] for text in TEXTS]
        found = [Interval(row["difference"], row["low"], row["high"], row["n"]) for row in rows]
        _bars(oracle, found)
        oracle.set_xticks(range(len(TEXTS)), ["itself", "next text", "other text"])
        oracle.set_xlabel("scored on")
        oracle.set_title(f"optimised gates, {count(found[0].n, 'window')}")


def _bars(axes: "Axes", found: list[Interval]) -> None:
    spread = [[one.mean - one.low for one in found], [one.high - one.mean for one in found]]
    style = {"color": GREEN, "linestyle": "none", "marker": "o", "capsize": 4}
    axes.errorbar(range(len(found)), [one.mean for one in found], yerr=spread, **style)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_xlim(-0.5, len(found) - 0.5)


def _map(axes: "Axes", values: "np.ndarray", heads: int, **style: object) -> "AxesImage":
    """Values from every head or layer (row) to every other (column), in blocks of layers; hatched: no connection."""
    import numpy as np

    layers = len(values) // heads
    layer = np.arange(len(values)) // heads
    mark_no_connection(axes, len(values))
    image = axes.imshow(np.where(layer[None] > layer[:, None], values, np.nan), interpolation="nearest", **style)
    axes.grid(False)
    if heads > 1:
        for border in itertools.accumulate([heads] * (layers - 1)):
            axes.axhline(border - 0.5, color="#767676", linewidth=0.4, alpha=0.6)
            axes.axvline(border - 0.5, color="#767676", linewidth=0.4, alpha=0.6)
    name_layers(axes, layers, heads)
    axes.set_xlabel("target layer")
    axes.set_ylabel("source layer")
    return image
