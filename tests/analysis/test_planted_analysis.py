"""Escape, context and recovery have their known values on wirings that are the planted ones, or are not."""

import numpy as np
import pytest
import torch
from small_dagformer import HEADS, LAYERS, make_base, make_windows

from dynaroute.analysis.controls import equally_dense
from dynaroute.analysis.nll import window_nll
from dynaroute.analysis.planted import context, escape, gradient_signs, known_nll, recovery, share
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward

VALID = dag_mask(LAYERS, HEADS)
E = int(VALID.sum())
SOURCES = np.array([0, 1, 1, 0, 1, 0])
DOCUMENTS = np.array([0, 1, 1, 2, 3, 4])


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    drawn = torch.rand(2, *VALID.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return drawn & VALID


def test_known_wirings_are_scored_as_each_alone_would_be(masks, tmp_path):
    graph, windows = DagForward(make_base()), make_windows(tmp_path, len(SOURCES))
    known = known_nll(graph, windows, masks, SOURCES, {"window": 0, "prefix": 3})
    alone = [window_nll(graph, windows, mask.float()) for mask in masks]
    assert known["window"]["own"] == pytest.approx(np.where(SOURCES == 0, *alone), rel=1e-6)
    assert known["window"]["other"] == pytest.approx(np.where(SOURCES == 1, *alone), rel=1e-6)
    assert known["prefix"]["one"] == pytest.approx(window_nll(graph, windows, VALID.float(), 3), rel=1e-6)
    assert known["window"]["zero"] == pytest.approx(window_nll(graph, windows, torch.zeros(VALID.shape)), rel=1e-6)


def test_escape_and_context_are_zero_at_the_start_and_one_at_the_planted_wirings():
    rng = np.random.default_rng(0)
    own = rng.normal(4, 0.1, 6)
    known = {"own": own, "one": own + rng.uniform(1, 2, 6)}
    control = own + 0.2
    assert escape(known["one"], known, DOCUMENTS).mean == pytest.approx(0)
    assert escape(own, known, DOCUMENTS).mean == pytest.approx(1)
    assert context(control, control, known, DOCUMENTS).mean == pytest.approx(0)
    assert context(own + 0.05, control, known, DOCUMENTS).mean == pytest.approx(0.75)


def test_the_interval_of_a_share_covers_the_true_ratio_19_times_in_20():
    covered, rng = 0, np.random.default_rng(1)
    for _ in range(400):
        effects, whole = rng.normal(0, 0.2, 40), rng.normal(2, 0.3, 80)
        documents = np.repeat(np.arange(40), 2)
        found = share(0.5 * whole + effects[documents] + rng.normal(0, 0.2, 80), whole, documents)
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_recovery_tells_the_planted_wirings_from_one_for_all(masks):
    planted = masks[:, VALID]
    found = recovery(planted[SOURCES].float(), planted, SOURCES, DOCUMENTS, 99, 0)
    assert found["agreement"] == pytest.approx(found["probe"]["observed"]) == 1
    found = recovery(planted[[0] * 6].float(), planted, SOURCES, DOCUMENTS, 99, 0)
    assert found["agreement"] < 1
    assert found["probe"] == {"observed": pytest.approx(0.5), "chance": pytest.approx(0.5), "p": 1}


def test_gradients_that_know_the_masks_rank_every_closed_edge_above_every_open_one(masks, monkeypatch):
    mine = torch.where(masks[SOURCES][:, VALID], -1.0, 1.0) + 0.1 * torch.randn(6, E)
    monkeypatch.setattr("dynaroute.analysis.planted.gate_gradients", lambda graph, windows: mine)
    graph = DagForward(make_base())
    found = gradient_signs(graph, None, masks, SOURCES)
    assert found == {"closed_positive": 1.0, "open_positive": 0.0, "ranked": 1.0}
    monkeypatch.setattr("dynaroute.analysis.planted.gate_gradients", lambda graph, windows: -mine)
    assert gradient_signs(graph, None, masks, SOURCES)["ranked"] == 0.0


def test_controls_of_equal_density_close_as_many_edges_of_every_text(masks):
    hard = (masks[SOURCES] | (torch.arange(6) == 2)[:, None, None] & VALID).float()  # one is fully open
    closed = (hard[:, VALID] == 0).sum(1)
    drawn = equally_dense(hard, VALID, seed=0)
    assert torch.equal((drawn[:, VALID] == 0).sum(1), closed) and not drawn[:, ~VALID].any()
    assert not torch.equal(drawn, hard) and torch.equal(drawn, equally_dense(hard, VALID, seed=0))
    order = np.arange(E)[::-1]
    for wiring, number in zip(equally_dense(hard, VALID, 0, order), closed.tolist(), strict=True):
        assert (wiring[VALID] == 0).nonzero().flatten().tolist() == sorted(order[:number].tolist())
