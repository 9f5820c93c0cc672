"""reports/dagformer_measured.md: times and memory, which no second run repeats to the byte."""

from dynaroute.reporting.dagformer.results import BENCHMARK, REFERENCE_VARIANT, Measurements, Results
from dynaroute.reporting.inputs import Record, code_measured
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
    """The outcome of benchmark_dag, size by size."""
    if benchmark is None:
        return f"Not measured: `make benchmarks` does it, and writes `{BENCHMARK}`."
    machine = ", ".join(f"{key} {value}" for key, value in benchmark["machine"].items())
    measured = [result for result in benchmark["results"] if result["candidates"]]  # others were too large
    # benchmark_dag computes in bfloat16 on CUDA and nowhere else, at sizes of its own.
    device, other = ("a GPU", "CPU") if benchmark["dtype"] == "bfloat16" else ("a CPU", "GPU")
    introduction = (
        "Outcome of `benchmark_dag`, which the default pipeline does not run, as it stands in "
        f"`{BENCHMARK}`. Dense is transformers' own forward, with backward to its embeddings; ours and the reference "
        "formulation, which concatenates all earlier head outputs at every layer, go backward to the adjacency. Random "
        f"weights, {benchmark['dtype']}; candidates take turns, and a ratio is the median over {benchmark['rounds']} "
        "rounds of the time to that of dense in the same round, with quartiles. Measured on "
        f"{device}: {machine}. {other} sizes: not measured. {code_measured('benchmark_dag')}"
    )
    return "\n\n".join([introduction, *(_benchmark_of_size(result) for result in measured)])


def _benchmark_of_size(result: Record) -> str:
    rows = [
        [
            name,
            *(cell for part in ("forward", "forward_backward") for cell in _timing(candidate[part])),
            size(candidate["forward_backward_peak_mib"] * 2**20) if "forward_backward_peak_mib" in candidate else NONE,
        ]
        for name, candidate in result["candidates"].items()
    ]
    header = ["", "forward", "ratio to dense", "forward + backward", "ratio to dense", "peak memory above weights"]
    sizes, bounds = result["size"], result["bounds"]
    by_flops, by_bytes = bounds["flop_bound"], bounds["squares_byte_bound"]
    ours = result["candidates"]["ours"]["forward_backward"]["ratio_to_dense"]
    shape = f"{sizes['L']} layers, {sizes['H']} heads, width {sizes['D']:,}, batch {sizes['B']}, {sizes['T']:,} tokens"
    return (
        f"**{shape}**\n\n{table(header, rows)}\n\n"
        f"Bounds on the ratio of forward and backward: by FLOPs {by_flops:.3f}, by bytes {by_bytes:.3f}. The larger "
        f"one is the floor: {max(by_flops, by_bytes):.3f}; ours is at {ours:.3f}. {_difference(result)}"
    )


def _difference(result: Record) -> str:
    difference = result["largest_difference_to_reference"]
    if difference is None:  # on a GPU, its memory may be too small for it
        return "The reference could not be computed."
    return f"Largest difference of its logits to the reference: {difference:.1e}."


def _timing(found: Record) -> tuple[str, str]:
    low, high = found["ratio_to_dense_quartiles"]
    return duration(found["milliseconds"] / 1000), f"{found['ratio_to_dense']:.2f} ({low:.2f}–{high:.2f})"
