import importlib.util
import sys

import pytest
from repository import REPOSITORY


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_dag", REPOSITORY / "stages" / "benchmark_dag.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_dag"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_dag"]


def test_ours_and_the_concatenating_formulation_that_it_is_timed_against_compute_the_same(benchmark):
    steps = benchmark.candidates(benchmark.Size(L=5, H=2, D=32, B=2, T=9), "cpu")
    ours, reference = (steps[name](True) for name in ("ours", "reference"))
    assert (ours - reference).abs().max() < 1e-5
    assert (ours - steps["dense"](True)).abs().max() > 1e-4


def test_the_flop_bounds_are_those_of_the_design(benchmark):
    small, large = (
        benchmark.bounds(size, dense_seconds=1, bytes_per_second=1e10, item_size=4)["flop_bound"]
        for size in benchmark.SIZES["cpu"]
    )
    assert small == pytest.approx(1.04, abs=0.005)
    assert large == pytest.approx(1.13, abs=0.005)


def test_squares_move_less_than_layer_by_layer_mixing(benchmark):
    for layers in (8, 12, 16):
        assert benchmark.mixing_traffic(layers, squares=True) < benchmark.mixing_traffic(layers, squares=False)
