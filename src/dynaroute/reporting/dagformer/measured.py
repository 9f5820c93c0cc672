"""reports/dagformer_measured.md: times and memory, which no second run repeats to the byte."""

from typing import Any

from dynaroute.reporting.dagformer.results import BENCHMARK, REFERENCE_VARIANT, Measurements, Results
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, duration, size, table


def measured_page(results: Results, measurements: Measurements) -> str:
    """The page as Markdown."""
    parts = [
        "# DAGFormer: what was measured",
        f"Base of run `{results.base['run']}` and {len(results.variants)} variants of it. Times and memory depend on "
        "the machine and on what else it does, so this page is exempt from what holds for [the report](dagformer.md), "
        "which is the same on every run: here another run gives other numbers.",
        *("## Machine", _machines(measurements)),
        *("## Speed", _speed(results, measurements)),
        *("## Every variant", _variants(measurements)),
        *("## The DAG forward against a dense one", _benchmark(measurements.benchmark)),
    ]
    return "\n\n".join(parts) + "\n"


def _machines(measurements: Measurements) -> str:
    """A column for each machine, with what ran there."""
    timings = {"base": measurements.base, **measurements.variants}
    machines: list[tuple[Record, list[str]]] = []
    for name, timing in timings.items():
        for machine, ran in machines:
            if machine == timing["machine"]:
                ran.append(name)
                break
        else:
            machines.append((timing["machine"], [name]))
    keys = dict.fromkeys(key for machine, _ in machines for key in machine)
    header = ["all" if len(machines) == 1 else ", ".join(ran) for _, ran in machines]
    return table(["", *header], [[key, *(str(machine.get(key, NONE)) for machine, _ in machines)] for key in keys])


def _speed(results: Results, measurements: Measurements) -> str:
    """The published table of speeds, of P1's training."""
    ours, theirs = measurements.variants[REFERENCE_VARIANT], results.reference["timing"]
    curve, knobs = results.main.curve, results.main.knobs
    step, round_ = ours["seconds_per_step"], ours["validation_seconds"]
    every = curve["step"].iloc[-1] / (len(curve) - 1)  # steps between validations
    evaluated = step + round_ / every
    windows = results.setup["validation_windows"]
    rows = [
        ["Training step", duration(step), f"about {theirs['seconds_per_step']} s"],
        ["Evaluation round", duration(round_), f"about {theirs['minutes_per_evaluation']} min"],
        ["Model loading", duration(ours["loading_seconds"]), f"about {theirs['minutes_loading']} min"],
        ["1K steps, no evaluation", _extrapolated(1000 * step), f"about {theirs['minutes_per_1000_steps']} min"],
        [
            "1K steps with evaluation",
            _extrapolated(1000 * evaluated),
            f"about {theirs['minutes_per_1000_steps_evaluated']} min",
        ],
        ["10K steps with evaluation", _extrapolated(10_000 * evaluated), f"about {theirs['hours_per_10000_steps']} h"],
        [
            "100K steps with evaluation",
            _extrapolated(100_000 * evaluated),
            f"about {theirs['days_per_100000_steps']} days",
        ],
        ["Peak memory", size(ours["peak_memory_bytes"]), NONE],
    ]
    source = f"{theirs['source']}, {theirs['hardware']}, batch {theirs['batch_size']}"
    return (
        f"{table(['component', 'this run', f'published ({source})'], rows)}\n\n"
        f"Of P1: batches of {knobs['batch_size']} windows of {results.setup['seq_len']:,} tokens, an evaluation round "
        f"of {windows:,} windows every {every:g} steps. The baseline is scored in a run's first round only. Published "
        "is another base, on another machine; what is marked as extrapolated was computed from step and round."
    )


def _extrapolated(seconds: float) -> str:
    return f"{duration(seconds)} (extrapolated)"


def _variants(measurements: Measurements) -> str:
    rows = [
        [
            name,
            duration(timing["seconds"]),
            duration(timing["seconds_per_step"]),
            duration(timing["validation_seconds"]),
            duration(timing["loading_seconds"]),
            size(timing["peak_memory_bytes"]),
        ]
        for name, timing in measurements.variants.items()
    ]
    base = measurements.base
    pretraining = f"Pretraining the base: {duration(base['training_seconds'])}. " if "training_seconds" in base else ""
    return (
        f"{table(['ID', 'all steps', 'one step', 'evaluation round', 'loading', 'peak memory'], rows)}\n\n"
        f"{pretraining}Peak memory while preparing the base: {size(base['peak_memory_bytes'])}."
    )


def _benchmark(benchmark: Record | None) -> str:
    """The outcome of benchmark_dag as it stands in its file."""
    if benchmark is None:
        return f"Not measured: `make benchmarks` does it, and writes `{BENCHMARK}`."
    rows = benchmark["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(name, row.get(name)) for name in columns] for row in rows]
    machine = ", ".join(f"{key} {value}" for key, value in benchmark["machine"].items())
    return (
        f"{table([name.replace('_', ' ') for name in columns], cells)}\n\nOutcome of `benchmark_dag`, which the "
        f"default pipeline does not run, as it stands in `{BENCHMARK}`; measured on: {machine}."
    )


def _cell(name: str, value: Any) -> str:
    if value is None:
        return NONE
    if name.endswith("bytes"):
        return size(value)
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
