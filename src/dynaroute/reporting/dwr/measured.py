"""reports/dwr_measured.md: times, speeds and memory, which no second run repeats to the byte."""

import math
from typing import Any

from dynaroute.reporting.dwr.results import MOE, Measurements, num_experts
from dynaroute.reporting.inputs import Record, code_measured
from dynaroute.reporting.tables import NONE, count, duration, figure, outcome, published, size, table


def measured_page(run: Record, measurements: Measurements, reference: Record) -> str:
    """The page as Markdown."""
    parts = [
        "# Dynamic weight retrieval (DWR): what was measured",
        f"Run `{run['run']}`. Times, speeds and memory depend on the machine and on what else it does, so this page is "
        "exempt from what holds for [the report](dwr.md), which is the same on every run: here another run gives other "
        "numbers. Compare only numbers of one table, which were measured together.",
        "## Machine",
        _machine(measurements),
        "## Training",
        _training(measurements.training, reference["timing"]),
        "## Cached inference",
        _cached(measurements, num_experts(run)),
        "## The MoE layer against a dense one",
        _moe(measurements.moe),
    ]
    return "\n\n".join(parts) + "\n"


def _machine(measurements: Measurements) -> str:
    """A column for each stage that measured: they may have run on different machines."""
    machines = {"training": measurements.training["machine"], "cached inference": measurements.cache["machine"]}
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
        f"{reference['hardware']} ({reference['source']}): a model of another size, on another machine."
    )
    return f"{table(['', 'this run'], rows)}\n\nValidation and checkpoints are not in that time.\n\n{theirs}"


def _cached(measurements: Measurements, total: int) -> str:
    header = [
        *("capacity (experts)", "c/N", "policy", "prefetching", "page cache", "tokens/s"),
        *("relative to resident (range)", "waiting", "late", "prefill", "peak memory", "anonymous", "experts mapped"),
    ]
    resident = ["all, resident", *[NONE] * 4, *_figures(measurements.resident)]
    cells = [
        [
            *(f"{row.capacity:,}", f"{row.capacity / total:.3f}", f"`{row.policy}`", row.prefetch, row.page_cache),
            *_figures(row),
        ]
        for row in measurements.cells.itertuples()
    ]
    third, checks = measurements.cache["at_a_third_of_the_experts"], measurements.cache["checks"]
    return "\n\n".join(
        [
            f"With {third['capacity']} of {total} experts held (`{third['policy']}`, prefetching "
            f"{third['prefetch']}), decoding runs at {third['ratio_to_resident']:.2f} of the speed of the resident "
            "model. Hit rates are in [the report](dwr.md#6-cached-inference). Experts of this size are read in "
            "microseconds: what reading costs at the published size is in [cached inference](cached_inference.md).",
            figure("figures/measured/dwr_cache_speed.png", "Decoding speed relative to all experts resident."),
            table(header, [resident, *cells]),
            f"Decoding is batch 1; speeds are medians of {count(measurements.cache['repeats'], 'repetition')}, taken "
            "in turns with the resident model, and each ratio is to the resident run of the same repetition: the ratio "
            "shown is a median of such pairs, not the quotient of two speeds shown. Waiting is the share of that time "
            "in which the caller waited for experts; late are prefetched experts that were asked for before they were "
            "there. Prefill is the time for all prompts. Page cache: warm, all files were read before; "
            "cold, the system forgot before every pass what was not in use. Peak memory is all that a fresh process "
            "held while decoding one prompt, Python and libraries included, and is measured with `lru` alone; "
            "anonymous is what it allocated, and experts mapped are the pages of expert files among the rest.",
            *(f"{outcome(passed)}: {name.replace('_', ' ')}." for name, passed in checks.items()),
        ]
    )


def _moe(found: Record | None) -> str:
    """The outcome of benchmark_moe: one layer by number of tokens, and training steps."""
    if found is None:
        return f"Not measured: `make benchmarks` does it, and writes `{MOE}`."
    sizes, training = found["sizes"], found["training"]
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    layers = [
        [
            *(f"{row['tokens']:,}", row["layer"].replace("_", " "), duration(row["milliseconds"] / 1000)),
            *(duration(row["interquartile_milliseconds"] / 1000), f"{row['ratio_to_dense']:.2f}"),
        ]
        for row in found["rows"]
    ]
    models = [
        [
            *(name.replace("_", " "), f"{one['parameters']:,}", duration(one["milliseconds"] / 1000)),
            f"{one['tokens_per_second']:,.0f}",
        ]
        for name, one in training["models"].items()
    ]
    ratios = "; ".join(
        f"{name.replace('_', ' ')}: {one['ratio']:.2f} ({one['quartiles'][0]:.2f}–{one['quartiles'][1]:.2f})"
        for name, one in training["tokens_per_second_ratios"].items()
    )
    header = ["tokens", "layer", "forward + backward", "interquartile range", "time, ratio to dense"]
    return "\n\n".join(
        [
            f"Outcome of `benchmark_moe`, which the default pipeline does not run, as it stands in `{MOE}`. Measured "
            f"on: {machine}. {code_measured('benchmark_moe')}",
            f"One layer of random weights: {sizes['d_model']} → {sizes['d_ff']:,} → {sizes['d_model']}, "
            f"{sizes['num_experts']} experts, top-{sizes['top_k']}. Ratios are to a dense FFN of the same kind and "
            "FLOPs, which for the layers of transformers is `gated dense`; above 1 is slower than dense.",
            table(header, layers),
            f"Whole training steps of {training['tokens_per_step']:,} tokens, {training['precision']}, with the model "
            "of the parameters; `dense` has an FFN with as many active parameters in place of every MoE layer.",
            table(["model", "parameters", "one step", "tokens/s"], models),
            f"Ratios of tokens/s, medians over rounds with quartiles, above 1 is faster: {ratios}.",
        ]
    )


def _figures(row: Any) -> list[str]:
    memory = (row.peak_memory_bytes, row.peak_anonymous_bytes, row.peak_mapped_expert_bytes)
    return [
        f"{row.tokens_per_second:,.0f}",
        f"{row.ratio_to_resident:.3f} ({row.ratio_lowest:.3f}–{row.ratio_highest:.3f})",
        f"{row.wait_share:.1%}",
        size(row.bytes_late),
        duration(row.prefill_seconds),
        *(NONE if math.isnan(kind) else size(kind) for kind in memory),
    ]
