"""reports/dwr_measured.md: times, speeds and memory, which no second run repeats to the byte."""

from typing import TYPE_CHECKING

from dynaroute.reporting.dwr.results import Measurements, num_experts
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, duration, figure, published, size, table

if TYPE_CHECKING:
    import pandas as pd


def measured_page(run: Record, measurements: Measurements, reference: Record) -> str:
    """The page as Markdown."""
    parts = [
        "# Dynamic weight retrieval (DWR): what was measured",
        f"Run `{run['run']}`. Times, speeds and memory depend on the machine and on what else it does, so this page is "
        "exempt from what holds for [the report](dwr.md): another run gives other numbers here. Only ratios of one "
        "table were measured together.",
        "## Machine",
        _machine(measurements),
        "## Training",
        _training(measurements.training, reference["timing"]),
        "## Cached inference",
        _cached(measurements.cache, num_experts(run)),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(measurements: Measurements) -> str:
    """A column for each stage that measured: they may have run on different machines."""
    machines = {"training": measurements.training["machine"], "cached inference": measurements.cache_machine}
    names = dict.fromkeys(name for machine in machines.values() for name in machine)
    rows = [[name, *(str(machine.get(name, NONE)) for machine in machines.values())] for name in names]
    return table(["", *machines], rows)


def _training(timing: Record, reference: Record) -> str:
    rows = [
        ["time in training steps", duration(timing["seconds"])],
        ["speed", f"{timing['tokens_per_second']:,.0f} tokens/s"],
        ["peak memory", size(timing["peak_memory_bytes"])],
    ]
    theirs = published(
        f"About {reference['minutes_per_epoch']} minutes an epoch, {reference['minutes']} minutes in all, on "
        f"{reference['hardware']} ({reference['source']}): another model, on another machine."
    )
    return f"{table(['', 'this run'], rows)}\n\nValidation and checkpoints are not in that time.\n\n{theirs}"


def _cached(timing: "pd.DataFrame", total: int) -> str:
    rows = [
        [
            "all, resident" if resident else f"{row.capacity:,.0f}",
            NONE if resident else f"{row.capacity / total:.3f}",
            NONE if resident else "warm" if row.warm_start else "cold",
            f"{row.tokens_per_second:,.1f}",
            f"{row.ratio_to_resident:.3f}",
        ]
        for row in timing.itertuples()
        for resident in [row.capacity != row.capacity]
    ]
    header = ["capacity (experts)", "c/N", "start", "tokens/s", "relative to resident"]
    return "\n\n".join(
        [
            figure("figures/measured/dwr_cache_speed.png", "Decoding speed relative to all experts resident."),
            table(header, rows),
        ]
    )
