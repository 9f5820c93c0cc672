from pathlib import Path

import pytest
from dwr_tree import edit_json

from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.reporting.dagformer.analyses import read_analyses
from dynaroute.reporting.dagformer.measured import measured_page
from dynaroute.reporting.dagformer.report import page
from dynaroute.reporting.dagformer.results import read_measurements, read_results

pytestmark = pytest.mark.usefixtures("dagformer_tree")

TIMING = Path("reports/dagformer_measured/P1.json")
BASE = Path("reports/dagformer_measured/base.json")
BENCHMARK = Path("reports/benchmarks/dag.json")


def measured() -> str:
    results = read_results(load_settings())
    return measured_page(results, read_measurements(results))


def test_it_says_that_it_is_exempt_and_names_the_base():
    text = measured()
    assert "`ba5e`" in text
    assert "exempt" in text


def test_the_published_speed_table_is_filled_and_what_was_not_measured_is_marked():
    # A tenth of a second of validation for every step, however often P1 is validated.
    validation_seconds = load_settings().validate_every / 10
    timing = {"seconds_per_step": 0.3, "validation_seconds": validation_seconds, "loading_seconds": 7.0}
    edit_json(TIMING, lambda data: data.update(timing))
    text = measured()
    assert "| Training step | 300 ms | about 3 s |" in text
    assert f"| Evaluation round | {validation_seconds:.1f} s | about 2 min |" in text
    assert "| Model loading | 7.0 s | about 10 min |" in text
    assert "| 1K steps, no evaluation | 5.0 min (extrapolated) | about 50 min |" in text
    assert "| 1K steps with evaluation | 6.7 min (extrapolated) | about 70 min |" in text
    assert "| 10K steps with evaluation | 66.7 min (extrapolated) | about 12 h |" in text
    assert "| 100K steps with evaluation | 11.1 h (extrapolated) | about 5 days |" in text
    assert "component | this run | published (" in text


def test_every_variant_and_the_base():
    edit_json("reports/dagformer_measured/A7.json", lambda data: data.update(seconds=99.9))
    text = measured()
    assert "| A7 | 99.9 s | 250 ms | 2.5 s | 3.5 s | 710.00 MiB |" in text
    assert "Pretraining the base: 2.0 min." in text
    edit_json(BASE, lambda data: data.pop("training_seconds"))  # a base that was loaded
    assert "Pretraining" not in measured()


def test_machines_are_told_apart():
    assert "| processor | A Processor 9000 |" in measured()
    edit_json(TIMING, lambda data: data["machine"].update(processor="Another"))
    text = measured()
    assert "| processor | A Processor 9000 | Another |" in text
    assert "| P1 |" in text.split("## Speed")[0]


def test_a_benchmark_that_was_not_run_is_said_to():
    assert "Not measured" in measured()


def write_benchmark(dtype: str = "float32", by_flops: float = 1.04, by_bytes: float = 1.076) -> None:
    def timing(ratio: float) -> dict:
        return {"milliseconds": 123 * ratio, "ratio_to_dense": ratio, "ratio_to_dense_quartiles": [ratio - 0.01, 9.87]}

    def candidate(ratio: float) -> dict:
        both = {"forward": timing(ratio + 0.5), "forward_backward": timing(ratio)}
        return {**both, "forward_backward_peak_mib": 345.6}

    result = {
        "size": {"L": 8, "H": 4, "D": 512, "B": 1, "T": 1256},
        "candidates": {"dense": candidate(1.0), "ours": candidate(1.11), "reference": candidate(3.21)},
        "bounds": {"flop_bound": by_flops, "squares_byte_bound": by_bytes},
        "fraction_of_byte_bound": 0.654,
        "largest_difference_to_reference": 2.5e-6,
    }
    write_json(BENCHMARK, {"dtype": dtype, "rounds": 9, "results": [result], "machine": {"processor": "Bench 1"}})


def test_a_benchmark_that_was_run_is_shown_with_its_machine_and_bounds():
    write_benchmark()
    text = measured()
    assert "processor Bench 1." in text
    assert "**8 layers, 4 heads, width 512, batch 1, 1,256 tokens**" in text
    assert "| ours | 198 ms | 1.61 (1.60–9.87) | 137 ms | 1.11 (1.10–9.87) | 345.60 MiB |" in text
    assert "by FLOPs 1.040, by bytes 1.076. The larger one is the floor: 1.076; ours is at 1.110." in text
    assert "65%" not in text
    write_benchmark(by_flops=1.09)
    assert "by FLOPs 1.090, by bytes 1.076. The larger one is the floor: 1.090; ours is at 1.110." in measured()


@pytest.mark.parametrize(("dtype", "device", "other"), [("float32", "CPU", "GPU"), ("bfloat16", "GPU", "CPU")])
def test_a_benchmark_says_on_which_device_it_was_run_and_where_it_was_not(dtype, device, other):
    write_benchmark(dtype)
    text = measured()
    assert f"Measured on a {device}: processor Bench 1. {other} sizes: not measured." in text
    assert f"{device} sizes: not measured" not in text


def test_measurements_do_not_change_the_report():
    before = report()
    edit_json(TIMING, lambda data: data.update(seconds_per_step=1.0))
    assert report() == before


def report() -> str:
    results = read_results(load_settings())
    return page(results, read_analyses(load_settings(), results))


@pytest.mark.parametrize(
    ("path", "content"),
    [
        *((path, content) for path in (TIMING, BASE) for content in (None, b"", b"[", b"a: [1")),
        *((BENCHMARK, content) for content in (b"", b"[")),  # which may be missing
    ],
    ids=str,
)
def test_a_missing_or_damaged_input_is_named(path, content):
    write_benchmark()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DynarouteError) as caught:
        measured()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
