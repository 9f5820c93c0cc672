import hashlib
import json
from pathlib import Path

import pytest
from dwr_tree import RUN, edit_csv, edit_json

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.reporting.dwr.measured import measured_page
from dynaroute.reporting.dwr.report import page
from dynaroute.reporting.dwr.results import MOE, read_measurements, read_results

pytestmark = pytest.mark.usefixtures("tree")

TIMING = Path("reports/dwr/cache_timing.csv")
SUMMARY = Path("reports/dwr/cache_timing.json")
TRAINING = Path("reports/dwr/training_timing.json")


def measured() -> str:
    results = read_results()
    return measured_page(results.run, read_measurements(results.run["run"]), results.reference)


def test_it_says_that_it_is_exempt_and_names_its_run():
    text = measured()
    assert RUN in text
    assert "exempt" in text


def test_speed_and_memory_of_every_cell():
    text = measured()
    assert (
        "| all, resident | – | – | – | – | 400 | 1.000 (0.610–1.310) | 12.5% | 321 B | 45.6 ms | 210.00 MiB |" in text
    )
    assert (
        "| 4 | 0.333 | `lru` | gate | warm | 406 | 0.940 (0.610–1.310) | 12.5% | 321 B | 45.6 ms | 210.00 MiB |" in text
    )
    edit_csv(TIMING, lambda timing: timing.__setitem__("tokens_per_second", 4321))
    assert "4,321" in measured()


def test_a_system_that_does_not_tell_the_kinds_of_memory_apart():
    def change(timing):
        timing["peak_anonymous_bytes"] = None
        timing["peak_mapped_expert_bytes"] = None

    edit_csv(TIMING, change)
    assert "| 210.00 MiB | – | – |" in measured()


def test_training_and_machines():
    text = measured()
    assert "12,346 tokens/s" in text
    assert "700.00 MiB" in text
    assert "| processor | A Processor 9000 | Another Processor |" in text
    assert "| torch | 2.9.99 | – |" in text


@pytest.mark.parametrize(("found", "words"), [(True, "✓"), (False, "✗ **failed**"), (None, "not measured")])
def test_the_outcome_of_a_check_is_shown(found, words):
    edit_json(SUMMARY, lambda data: data["checks"].__setitem__("memory_is_bounded", found))
    assert f"{words}: memory is bounded." in measured()


def test_published_times_are_marked():
    assert "> **Published.** About 7 minutes an epoch, 72 minutes in all" in measured()


def test_measurements_do_not_change_the_report():
    before = page(read_results())
    edit_csv(TIMING, lambda timing: timing.__setitem__("tokens_per_second", 4321))
    edit_json(TRAINING, lambda data: data.__setitem__("seconds", 1.0))
    assert page(read_results()) == before


@pytest.mark.parametrize("path", [TIMING, SUMMARY, TRAINING], ids=str)
@pytest.mark.parametrize("content", [None, b"", b"[", b"a: [1"])
def test_a_missing_or_damaged_input_is_named(path, content):
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DynarouteError) as caught:
        measured()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_measurements_of_another_run_are_refused():
    edit_json(SUMMARY, lambda data: data.__setitem__("run", "fedcba"))
    with pytest.raises(DynarouteError, match="belongs to run fedcba"):
        measured()


@pytest.mark.parametrize("column", ["capacity", "policy", "page_cache"])
def test_a_table_without_its_cells_is_refused(column):
    edit_csv(TIMING, lambda timing: timing.drop(columns=column))
    with pytest.raises(DynarouteError, match=r"cache_timing\.csv: "):
        measured()


def test_a_benchmark_of_the_layer_that_was_not_run_is_said_to():
    assert "Not measured" in measured().split("## The MoE layer")[1]


def test_a_benchmark_of_the_layer_is_shown_with_what_has_changed_since():
    layer = {"milliseconds": 12.3, "interquartile_milliseconds": 1.5, "ratio_to_dense": 1.67}
    model = {"parameters": 4_321, "milliseconds": 45.6, "tokens_per_second": 9_876.5}
    training = {"tokens_per_step": 2_048, "precision": "fp32", "models": {"plain_loop": model}}
    training["tokens_per_second_ratios"] = {"dynaroute_to_dense": {"ratio": 0.857, "quartiles": [0.78, 0.9]}}
    sizes = {"d_model": 512, "d_ff": 2048, "num_experts": 16, "top_k": 2}
    rows = [{"tokens": 8192, "layer": "dynaroute", **layer}]
    write_json(MOE, {"sizes": sizes, "rows": rows, "training": training, "machine": {"processor": "Bench 1"}})
    text = measured()
    assert "| 8,192 | dynaroute | 12.3 ms | 1.5 ms | 1.67 |" in text
    assert "| plain loop | 4,321 | 45.6 ms | 9,876 |" in text
    assert "dynaroute to dense: 0.86 (0.78–0.90)." in text
    assert "processor Bench 1. At which state of the code is not recorded." in text
    Path("same.py").write_text("a")
    Path("other.py").write_text("b")
    same = hashlib.md5(b"a").hexdigest()
    deps = [{"path": path, "md5": same} for path in ("same.py", "other.py", "gone.py")]
    Path("benchmarks").mkdir()
    Path("benchmarks/dvc.lock").write_text(json.dumps({"stages": {"benchmark_moe": {"deps": deps}}}))
    assert "Of the 3 files listed there, changed since: `other.py`, `gone.py`." in measured()
