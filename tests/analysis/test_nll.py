import math

import numpy as np
import pytest
import torch
from small_base import EMBEDDING, HEADS, LAYERS, make_base
from small_dagformer import make_predictor, make_windows

from dynaroute.analysis.nll import compare_to_base, mean_nll, window_nll, wire
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.training.nll import token_nll

VALID = dag_mask(LAYERS, HEADS)


@pytest.fixture
def windows(tmp_path):
    return make_windows(tmp_path)


def test_token_nll_equals_a_plain_loop_and_skips_what_is_ignored():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[4, 0, 2], [1, -100, 3]])
    found = token_nll(logits, targets)
    for b in range(2):
        for t in range(3):
            if targets[b, t] == -100:
                assert found[b, t] == 0
            else:
                total = sum(math.exp(x) for x in logits[b, t].tolist())
                expected = math.log(total) - logits[b, t, targets[b, t]].item()
                assert found[b, t].item() == pytest.approx(expected, rel=1e-5)
    assert token_nll(logits.bfloat16(), targets).dtype == torch.float32


def test_the_mean_of_a_window_counts_from_the_first_position_on_in_float64():
    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 2.0**25 / 3]])
    assert mean_nll(nll).tolist() == pytest.approx([15 / 4, (112 + nll[1, 3].item()) / 4], rel=1e-12)
    assert mean_nll(nll, 2)[0] == 6.0
    assert nll[0].tolist() == [1.0, 2.0, 4.0, 8.0]  # its argument is as it was


def test_open_gates_are_the_base_of_transformers(windows):
    base = make_base()
    found = window_nll(DagForward(base), windows, VALID.float())
    for index, nll in enumerate(found):  # nothing of ours: transformers reads T + 1 tokens and shifts them itself
        start = windows.indices[index] * windows.seq_len
        stream = windows.windows.shards.read(start, start + windows.seq_len + 1)
        stream = torch.from_numpy(stream.astype(np.int64))[None]
        assert nll == pytest.approx(float(base(stream, labels=stream).loss), abs=1e-5)
    assert np.abs(window_nll(DagForward(base), windows, torch.zeros(VALID.shape)) - found).min() > 1e-3


@pytest.mark.parametrize("first", [0, 5])
def test_every_window_is_scored_under_its_own_wiring(windows, first):
    graph, predictor = DagForward(make_base()), make_predictor()
    adjacency = wire(predictor, torch.randn(len(windows), EMBEDDING), 0.5).soft
    found = window_nll(graph, windows, adjacency, first)
    tokens, targets = windows.batch(range(len(windows)))
    for index in range(len(windows)):  # and alone, not in a batch
        logits = graph(tokens[index : index + 1], adjacency[index : index + 1])
        alone = token_nll(logits, targets[index : index + 1])[:, first:].mean()
        assert found[index] == pytest.approx(alone.item(), rel=1e-5)
    assert not np.allclose(found, window_nll(graph, windows, adjacency.flip(0), first), atol=1e-3)


def test_the_divergence_from_the_base_is_that_of_its_distributions(windows):
    graph, adjacency = DagForward(make_base()), VALID.float().expand(len(windows), -1, -1)
    wirings = {"closed": torch.zeros(adjacency.shape), "opened": adjacency}
    nll, kl = compare_to_base(graph, graph, windows, wirings)
    assert kl["opened"].abs().max() < 1e-6
    assert torch.equal(nll["baseline"], nll["opened"])
    tokens, _ = windows.batch(range(len(windows)))
    with torch.no_grad():
        expected, closed = (
            torch.distributions.Categorical(logits=graph(tokens, a)) for a in (adjacency, wirings["closed"])
        )
    torch.testing.assert_close(kl["closed"], torch.distributions.kl_divergence(expected, closed), rtol=1e-4, atol=1e-6)


def test_wirings_are_what_the_predictor_says_and_hold_no_gradients():
    predictor = make_predictor()
    embeddings = torch.randn(3, EMBEDDING)
    wiring = wire(predictor, embeddings, 0.7)
    assert torch.equal(wiring.logits, predictor.logits(embeddings))
    assert torch.equal(wiring.soft, predictor(embeddings, 0.7, "soft"))
    assert torch.equal(wiring.hard, predictor(embeddings, 0.7, "hard"))
    assert torch.equal(wiring.gates("soft"), wiring.soft[:, VALID])
    assert not any(part.requires_grad for part in wiring)
    assert 0 < wiring.hard[:, VALID].mean() < 1  # else these tests would show little
