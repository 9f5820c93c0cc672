"""Gradients, removals and optimised gates do what they say, and find what was planted."""

import itertools

import numpy as np
import pytest
import torch
from small_dagformer import HEADS, LAYERS, make_base, make_windows

from dynaroute.analysis.nll import window_nll
from dynaroute.analysis.sensitivity import flatness, gate_gradients, optimise_gates, removal_orders, without_edges
from dynaroute.analysis.statistics import document_means
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.windows import Subset

VALID = dag_mask(LAYERS, HEADS)
EDGES = [(i, j) for i, j in itertools.product(range(LAYERS * HEADS), repeat=2) if i // HEADS < j // HEADS]


@pytest.fixture(scope="module")
def graph() -> DagForward:
    return DagForward(make_base().double())


def test_gradients_are_what_a_small_change_of_a_gate_does(graph, tmp_path):
    windows = make_windows(tmp_path, 5)
    gradients = gate_gradients(graph, windows)
    assert gradients.shape == (5, len(EDGES))
    for number in (0, 3, len(EDGES) - 1):
        step, change = 1e-2, VALID.double()
        change[EDGES[number]] = 0
        sides = [VALID.double() + sign * step * (VALID.double() - change) for sign in (1, -1)]
        above, below = (nll_in_float64(graph, windows, side) for side in sides)
        assert gradients[:, number].numpy() == pytest.approx((above - below) / (2 * step), rel=2e-2, abs=1e-4)


def nll_in_float64(graph: DagForward, windows, adjacency: torch.Tensor) -> np.ndarray:
    """NLL summed in float64: what a small step changes is nearly lost in float32."""
    tokens, targets = windows.batch(range(len(windows)))
    with torch.no_grad():
        logits = graph(tokens, adjacency.expand(len(tokens), -1, -1))
    return torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").mean(1).numpy()


def test_what_is_removed_is_what_was_named():
    def removed(adjacency: torch.Tensor) -> set[tuple[int, int]]:
        assert not adjacency[~VALID].any()
        return {edge for edge in EDGES if adjacency[edge] == 0}

    assert removed(without_edges(LAYERS, HEADS, np.array([1, 4]))) == {EDGES[1], EDGES[4]}
    assert removed(without_edges(LAYERS, HEADS, np.arange(len(EDGES)))) == set(EDGES)
    assert removed(without_edges(LAYERS, HEADS, np.array([], int))) == set()


def test_orders_of_removal():
    gradient = np.array([0.2, -0.1, 0.0, -0.5, 0.4])
    orders = removal_orders(gradient, random=3, seed=0)
    assert [order.tolist() for order in orders["least_gradient"]] == [[2, 1, 0, 4, 3]]
    assert [order.tolist() for order in orders["expected_gain"]] == [[4, 0, 2, 1, 3]]
    assert len({tuple(order) for order in orders["random"]}) > 1
    assert all(sorted(order) == list(range(5)) for order in orders["random"])
    again = removal_orders(gradient, random=3, seed=0)["random"]
    assert [order.tolist() for order in orders["random"]] == [order.tolist() for order in again]


def test_gates_optimised_on_a_window_lower_its_nll_and_stay_gates(graph, tmp_path):
    windows = make_windows(tmp_path, 5)
    gates = optimise_gates(graph, windows, steps=6, lr=0.1)
    assert (gates >= 0).all() and (gates <= 1).all() and not gates[:, ~VALID].any()
    assert (gates[:, VALID] < 1).any(1).all()
    assert (window_nll(graph, windows, gates) < window_nll(graph, windows, VALID.float())).all()


def test_each_window_is_optimised_by_itself(graph, tmp_path):
    windows = make_windows(tmp_path, 5)
    together = optimise_gates(graph, windows, 4, 0.1)
    alone = torch.cat([optimise_gates(graph, Subset(windows, [index]), 4, 0.1) for index in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


# --- flat, or not --------------------------------------------------------------------------------------------------


def gradients(mean: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of 60 gates whose mean is 0 for the first 40 and `mean` for the others, and the windows' documents.

    Windows of one document are alike, as those of real text are, and one document has half of all.
    """
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(16), [30, *[2] * 15])
    found = rng.normal(size=(16, 60))[documents] + 0.5 * rng.normal(size=(60, 60))
    found[:, 40:] += mean
    return found, documents


@pytest.mark.parametrize("mean", [1.5, -1.5])
def test_a_slope_that_was_planted_is_found_with_its_sign(mean):
    values, documents = gradients(mean, seed=0)
    found = flatness(values, documents, 199, 0)
    assert found["p"] <= 2 / 200
    assert found["size_of_mean"] > 1.3 * found["size_by_chance"]
    assert (found["n"], found["documents"], found["gates"]) == (60, 16, 60)
    assert (np.sign(document_means(values, documents).mean(0)[40:]) == np.sign(mean)).all()


def test_documents_that_differ_are_no_slope():
    found = [flatness(*gradients(0.0, seed), 99, 0)["p"] for seed in range(60)]
    assert np.mean(np.array(found) < 0.05) < 0.15


def test_the_mean_of_a_gate_gives_each_document_the_same_weight():
    """One document of many windows says the opposite of all others: the mean over windows has another sign."""
    documents = np.repeat(np.arange(16), [60, *[1] * 15])
    values = np.where(documents == 0, -1.0, 1.0)[:, None] * np.array([1.0, -1.0, 1.0])
    assert np.sign(values.mean(0)).tolist() == [-1, 1, -1]
    expected = [np.mean([values[documents == one, gate].mean() for one in range(16)]) for gate in range(3)]
    assert document_means(values, documents).mean(0) == pytest.approx(expected)
