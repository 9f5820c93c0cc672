"""The benchmark of the DAG forward: what it compares computes the same, and its bounds and records are right."""

import json
from dataclasses import replace
from pathlib import Path

import benchmark_dag as benchmark
import pytest
import torch
from small_settings import default_settings

from dynaroute.errors import DynarouteError

TINY = benchmark.Size(L=3, H=2, D=32, B=2, T=9, V=64)


@pytest.mark.parametrize("key_value_heads", [None, 2])
def test_ours_and_the_concatenating_formulation_that_it_is_timed_against_compute_the_same(key_value_heads):
    steps = benchmark.candidates(benchmark.Size(L=5, H=4, D=32, B=2, T=9, KV=key_value_heads), "cpu")
    ours, reference = (steps[name](True) for name in ("ours", "reference"))
    assert (ours - reference).abs().max() < 1e-5
    assert (ours - steps["dense"](True)).abs().max() > 1e-4


def test_the_flop_bounds_are_those_of_the_design():
    small, large, llama = (
        benchmark.bounds(size, dense_seconds=1, bytes_per_second=1e10, item_size=4)["flop_bound"]
        for size in benchmark.SIZES["cpu"]
    )
    assert small == pytest.approx(1.04, abs=0.005)
    assert large == pytest.approx(1.13, abs=0.005)
    assert llama == pytest.approx(1.22, abs=0.005)


def test_the_largest_gpu_size_is_the_published_1b_model():
    size = benchmark.SIZES["cuda"][-1]
    with torch.device("meta"):
        base = benchmark.make_base(size, "meta")
    assert sum(parameter.numel() for parameter in base.parameters()) == 1_484_916_736


@pytest.fixture
def quick(tmp_path, monkeypatch) -> None:
    """A benchmark of a tiny size in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(benchmark.SIZES, "cpu", (TINY,))
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e9)


def test_every_size_is_recorded_with_what_failed(quick, monkeypatch):
    def too_large(self, tokens, adjacency):
        raise torch.OutOfMemoryError("CUDA out of memory.\nOf 139 GiB, none is free.")

    monkeypatch.setattr(benchmark.ConcatenatingDag, "forward", too_large)
    benchmark.main(default_settings())
    (result,) = json.loads(Path("reports/benchmarks/dag.json").read_text())["results"]
    others = {"key_value_heads": 2, "intermediate_size": 128, "vocabulary": 64}
    assert result["size"] == {"L": 3, "H": 2, "D": 32, "B": 2, "T": 9, **others}
    assert result["failed"] == {"reference": "OutOfMemoryError: CUDA out of memory."}
    assert list(result["candidates"]) == ["dense", "ours"]
    assert result["largest_difference_to_reference"] is None
    ours = result["candidates"]["ours"]["forward_backward"]["ratio_to_dense"]
    assert result["fraction_of_byte_bound"] == pytest.approx(result["bounds"]["squares_byte_bound"] / ours)


def test_a_size_that_the_memory_cannot_hold_is_named_and_the_others_are_measured(quick, monkeypatch):
    monkeypatch.setitem(benchmark.SIZES, "cpu", (TINY, replace(TINY, B=4)))
    forward = benchmark.DagForward.forward

    def limited(self, tokens, adjacency):
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.\nOf 22 GiB, none is free.")
        return forward(self, tokens, adjacency)

    monkeypatch.setattr(benchmark.DagForward, "forward", limited)
    limit = TINY.B
    benchmark.main(default_settings())
    small, large = json.loads(Path("reports/benchmarks/dag.json").read_text())["results"]
    assert small["candidates"] and not small["failed"]
    assert large["size"] == small["size"] | {"B": 4}
    assert large["candidates"] == {} and large["failed"] == {"ours": "OutOfMemoryError: CUDA out of memory."}
    limit = 0
    with pytest.raises(DynarouteError, match=r"no size could be measured: .*'B': 2.*out of memory"):
        benchmark.main(default_settings())


def test_compiled_candidates_compute_what_the_others_do(monkeypatch):
    # Compiled code itself takes half a minute to make; here the captured graphs are run as they are.
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda code: compile_with(code, backend="eager"))
    steps = benchmark.candidates(TINY, "cpu", compiled=True)
    assert len(steps) == 6
    for name in ("dense", "ours", "reference"):
        torch.testing.assert_close(steps[f"{name}_compiled"](False), steps[name](False))


def test_it_counts_what_is_alive_views_once_and_the_most_at_any_time():
    with benchmark.MemoryCount() as memory:
        one = torch.zeros(1000)
        assert memory.now == 4000
        view, other = one.view(10, 100), one.double()
        assert memory.now == 12_000
        del one, other
        assert memory.now == 4000  # the view keeps it
        del view
        assert (memory.now, memory.peak) == (0, 12_000)
