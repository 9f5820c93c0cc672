import benchmark_dag as benchmark
import pytest


def test_ours_and_the_concatenating_formulation_that_it_is_timed_against_compute_the_same():
    steps = benchmark.candidates(benchmark.Size(L=5, H=2, D=32, B=2, T=9), "cpu")
    ours, reference = (steps[name](True) for name in ("ours", "reference"))
    assert (ours - reference).abs().max() < 1e-5
    assert (ours - steps["dense"](True)).abs().max() > 1e-4


def test_the_flop_bounds_are_those_of_the_design():
    small, large = (
        benchmark.bounds(size, dense_seconds=1, bytes_per_second=1e10, item_size=4)["flop_bound"]
        for size in benchmark.SIZES["cpu"]
    )
    assert small == pytest.approx(1.04, abs=0.005)
    assert large == pytest.approx(1.13, abs=0.005)


def test_squares_move_less_than_layer_by_layer_mixing():
    for layers in (8, 12, 16):
        assert benchmark.mixing_traffic(layers, squares=True) < benchmark.mixing_traffic(layers, squares=False)
