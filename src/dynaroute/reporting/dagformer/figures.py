"""The figures of the DAGFormer report."""

import itertools
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.reporting.dagformer.page import ORDERS
from dynaroute.reporting.dagformer.results import CONTROL, DATA, MAIN, Analyses, Comparisons, Results, Variant
from dynaroute.reporting.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, saved_figure
from dynaroute.reporting.inputs import read_checkpoint

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FAR_OFF = 6  # medians of what variants differ by from the baseline
CURVES = {
    "random": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "least_gradient": {"color": VERMILION, "linestyle": "--", "marker": "s"},
}
POINTS = {  # variants by kind
    MAIN: {"marker": "D", "color": BLACK, "label": f"{MAIN} and its seeds"},
    CONTROL: {"marker": "*", "color": GREEN, "markersize": 9, "label": f"{CONTROL} and its seeds"},
    "": {"marker": "x", "color": GREY, "label": "other variants"},
}


class Recovered(NamedTuple):
    """The planted wirings of the sources, and those that a variant gives to their texts."""

    sources: list[str]
    planted: "np.ndarray"  # [C, N, N] of 0 and 1
    found: "np.ndarray"  # [C, N, N], mean hard gate over the texts of a source
    num_heads: int


def read_recovered(best: Variant) -> Recovered:
    """The planted wirings and, by the prefix protocol, a variant's. Raises DynarouteError if a file is damaged."""
    import numpy as np
    import torch

    from dynaroute.dagformer.gates import cascade, dag_mask
    from dynaroute.dagformer.planted import load_masks

    masks, sources = load_masks(DATA / "train/planted")
    gates, state = read_checkpoint(DATA / "eval" / best.name / "gates.safetensors")
    hard = torch.zeros(len(gates["prefix.logits"]), *masks.shape[1:])
    hard[:, dag_mask(state["num_layers"], state["num_heads"])] = (gates["prefix.logits"] > 0).float()
    if best.knobs["cascade"] != "off":
        hard = cascade(hard, 0.0, state["num_heads"], hard=True, exempt_first_layer=best.knobs["exempt_first_layer"])
    windows = best.windows[best.windows["protocol"] == "prefix"]
    found = [hard[torch.from_numpy(windows["source"].to_numpy() == source)].mean(0).numpy() for source in sources]
    return Recovered(sources, masks.float().numpy(), np.stack(found), state["num_heads"])


def plot_topology(name: str, path: str | Path) -> None:
    """A variant's mean hard gates from layer to layer; and distances of wirings, of two texts and of one.

    Raises:
        DynarouteError: a file is missing or damaged.
    """
    from dynaroute.analysis.topology import by_layer_pair  # torch is slow to import

    gates, state = read_checkpoint(DATA / "eval" / name / "gates.safetensors")
    wirings, _ = read_checkpoint(DATA / "analysis" / name / "wirings.safetensors")
    by_layer = by_layer_pair(gates["window.mean_hard"], state["num_heads"]).numpy()  # [L, L], of texts and heads
    shown = {"of different texts": wirings["distances"], "of a window and its prefix": wirings["same_text"]}
    most = max(1e-6, *(float(values.max()) for values in shown.values()))
    with saved_figure(path, 7.2, 3.2) as figure:
        layers, distances = figure.subplots(1, 2)
        image = _map(layers, by_layer, 1, vmin=0, vmax=1)
        figure.colorbar(image, ax=layers, label=f"share of {name}'s hard gates that are open")
        for source, target in itertools.combinations(range(len(by_layer) if len(by_layer) <= 8 else 0), 2):
            value = by_layer[source, target]
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": "black" if value > 0.5 else "white"}
            layers.text(target, source, f"{value:.2f}".removeprefix("0"), **style)
        for (label, values), color, hatch in zip(shown.items(), (BLUE, ORANGE), ("", "////"), strict=True):
            style = {"color": color, "alpha": 0.55, "hatch": hatch, "edgecolor": BLACK, "linewidth": 0.4}
            weights = [1 / len(values)] * len(values)
            distances.hist(values.numpy(), bins=25, range=(0, most), weights=weights, label=label, **style)
        distances.set_xlabel("weighted Jaccard distance of two wirings")
        distances.set_ylabel("share of pairs")
        distances.legend()


def plot_planted(recovered: Recovered | None, path: str | Path) -> None:
    """A column for each source: its planted wiring, and the mean hard gates of its texts under that of a predictor."""
    with saved_figure(path, 7.2, 3.7 if recovered else 0.6) as figure:
        if recovered is None:
            figure.text(0.5, 0.5, "no planted base at this scale", ha="center", va="center")
            return
        number = min(4, len(recovered.sources))
        panels = figure.subplots(2, number, squeeze=False)
        for column in range(number):
            for row, wirings in zip(panels, (recovered.planted, recovered.found), strict=True):
                image = _map(row[column], wirings[column], recovered.num_heads, vmin=0, vmax=1)
                row[column].set(xlabel=None, ylabel=None)
            panels[0, column].set_title(recovered.sources[column])
            panels[1, column].set_xlabel("target layer")
        panels[0, 0].set_ylabel("planted\nsource layer")
        panels[1, 0].set_ylabel("found\nsource layer")
        figure.colorbar(image, ax=panels, label="share of texts whose gate is open", shrink=0.6)


def plot_edges_closed(analyses: Analyses, results: Results, comparisons: Comparisons, path: str | Path) -> None:
    """Hard NLL minus baseline by the share of edges closed, with 95 % intervals.

    Left: edges closed in two orders, gates that were optimised on a window, and every variant. Right: the variants
    without those that are far off, and as many edges closed in the same orders, all on the held-out windows. The
    order by expected gain is left out, and so are bases that were trained on.
    """
    rows, oracle, removal = comparisons.hard, analyses.sensitivity["oracle"], analyses.removal
    kinds = dict.fromkeys(comparisons.seeds["seeds"], MAIN) | dict.fromkeys(comparisons.control_seeds["seeds"], CONTROL)
    points = {
        name: (1 - variant.evaluation["window"]["density_hard"], rows.loc[name, "difference"])
        for name, variant in results.variants.items()
        if variant.knobs["base_lr"] == 0
    }
    limit = FAR_OFF * median(abs(difference) for _, difference in points.values())
    near_by = {name: point for name, point in points.items() if point[1] <= limit or name == MAIN}
    with saved_figure(path, 7.2, 4.0) as figure:
        overview, closer = figure.subplots(1, 2)
        for order, style in CURVES.items():
            own = removal[removal["order"] == order].sort_values("fraction")
            label = f"edges closed: {ORDERS[order]}, {analyses.sensitivity['removal_windows']} windows"
            overview.plot(own["fraction"], own["mean"], label=label, **style)
            band = own["fraction"], own["low"], own["high"]
            overview.fill_between(*band, color=style["color"], alpha=0.1, linewidth=0)
            over = [difference - rows.loc[name, f"{order}_difference"] for name, (_, difference) in near_by.items()]
            style = style | {"linestyle": "none", "markerfacecolor": "none"}
            label = f"as many closed: {ORDERS[order]}, {len(results.documents)} windows"
            closer.plot([closed for closed, _ in near_by.values()], over, label=label, **style)
        for axes, shown in ((overview, points), (closer, near_by)):
            axes.axhline(0, color=BLACK, linewidth=0.8)
            axes.set_xlabel("share of edges closed")
            for name, point in shown.items():
                kind = kinds.get(name, "")
                label = f"{POINTS[kind]['label']}, {len(results.documents)} windows"
                axes.plot(*point, **POINTS[kind] | {"label": label}, linestyle="none")
                if axes is closer:
                    axes.vlines(point[0], *rows.loc[name, ["low", "high"]], color=POINTS[kind]["color"], linewidth=0.7)
        for text, marker, words in (("same", "P", "scored window"), ("next", "X", "window before")):
            found = oracle[text]
            style = {"color": PURPLE, "marker": marker, "linestyle": "none", "capsize": 2, "markersize": 7}
            margin = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
            label = f"optimised on the {words}, {oracle['windows']} windows"
            overview.errorbar(oracle["closed"], found["mean"], yerr=margin, label=label, **style)
        closed, difference = zip(*near_by.values(), strict=True)
        width, height = max(0.1, max(closed)), max(1e-3, max(difference) - min(0.0, *difference))
        closer.set_xlim(-0.08 * width, 1.15 * width)
        closer.set_ylim(min(0.0, *difference) - 0.25 * height, max(difference) + 0.3 * height)
        for name, (x, y) in near_by.items():  # in a crowd, only P1 has its name
            near = (abs(x - u) < 0.1 * width and abs(y - v) < 0.12 * height for u, v in near_by.values())
            if name == MAIN or sum(near) == 1:
                closer.annotate(name, (x, y), (5, 3), textcoords="offset points", fontsize=7)
        overview.set_ylabel("hard NLL minus baseline (nats per token)")
        overview.set_title("all")
        closer.set_title(f"closer, all on {len(results.documents)} windows")
        handles = {
            label: handle
            for axes in (overview, closer)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2)


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
