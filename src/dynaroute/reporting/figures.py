"""The style of figures, readable in print and by the colour-blind, and how they are saved: always the same bytes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dynaroute.pipeline.artifacts import output_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where figures are made: it is slow to import

# Okabe and Ito's colours, distinct with every common colour blindness. Lines also differ in style and marker.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY = "#767676"  # for reference lines

MAX_WIDTH = 7.2  # inches, 792 pixels: `dvc plots diff` shows two figures side by side

STYLE = {
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextlib.contextmanager
def saved_figure(path: str | Path, width: float, height: float) -> Iterator["Figure"]:
    """Yields an empty figure of a size in inches, at most `MAX_WIDTH` wide; writes it as PNG when the block succeeds.

    Without pyplot there is no window system and no global state, and a user's own matplotlib settings do not matter.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(min(width, MAX_WIDTH), height))
        yield figure
        with output_file(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})  # no version of matplotlib
