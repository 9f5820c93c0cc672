import math

import numpy as np
import pytest
import torch
from small_base import EMBEDDING, HEADS, LAYERS, make_base
from small_dagformer import make_predictor, make_windows, write_tokens

from dynaroute.analysis.nll import (
    baseline_nll,
    check_same_baseline,
    sequence_nll,
    token_nll,
    tokens_by_source,
    wire,
    wired_nll,
)
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_csv

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


def test_sequence_nll_counts_from_the_first_position_on_and_only_real_targets():
    nll = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 0.0]])
    targets = torch.tensor([[1, 1, 1, 1], [1, 1, 1, -100]])
    for first, sums, counts in ((0, [15, 112], [4, 3]), (2, [12, 64], [2, 1])):
        found = sequence_nll(nll, targets, first)
        assert found[0].dtype == torch.float64
        assert found[0].tolist() == sums
        assert found[1].tolist() == counts


def test_sums_are_taken_in_float64():
    nll = torch.full((1, 3), 1 / 3)
    nll[0, 0] = 2.0**25  # next to it, a third is lost in float32
    sums, _ = sequence_nll(nll, torch.zeros(1, 3, dtype=torch.long))
    assert sums.item() == pytest.approx(2.0**25 + 2 / 3, abs=1e-6)


def test_the_baseline_is_the_base_of_transformers(windows):
    base = make_base()
    baseline = baseline_nll(DagForward(base), windows, 4)
    _, targets = windows.batch(range(len(windows)))
    sums, counts = sequence_nll(baseline.nll, targets)
    assert sums.sum().item() / counts.sum().item() == pytest.approx(baseline.transformers_nll, abs=1e-6)
    assert 0 < baseline.largest_logit_difference < 1e-4
    # Window by window, and with nothing of ours: transformers reads the stream of T + 1 tokens and shifts it once.
    for index, nll in enumerate(sums / counts):
        start = windows.indices[index] * windows.seq_len
        stream = windows.windows.shards.read(start, start + windows.seq_len + 1)
        stream = torch.from_numpy(stream.astype(np.int64))[None]
        assert nll.item() == pytest.approx(float(base(stream, labels=stream).loss), abs=1e-5)


def test_a_wrong_base_shows_in_the_comparison_with_transformers(windows):
    graph = DagForward(make_base())
    weight = graph.base.model.layers[1].self_attn.v_proj.weight
    weight.copy_(weight.flip(0))  # after it was stacked
    baseline = baseline_nll(graph, windows, 4)
    mean = baseline.nll.double().mean().item()
    assert abs(mean - baseline.transformers_nll) > 1e-4
    assert baseline.largest_logit_difference > 1e-3


def test_open_gates_are_the_baseline_to_the_bit_and_shut_ones_are_not(windows):
    graph = DagForward(make_base())
    baseline = baseline_nll(graph, windows, 4)
    opened = wired_nll(graph, windows, VALID.float().repeat(len(windows), 1, 1), 4)
    assert torch.equal(opened, baseline.nll)
    shut = wired_nll(graph, windows, torch.zeros(len(windows), *VALID.shape), 4)
    assert (shut.mean(1) - baseline.nll.mean(1)).abs().min() > 1e-3


def test_every_window_is_scored_under_its_own_wiring(windows):
    graph, predictor = DagForward(make_base()), make_predictor()
    adjacency = wire(predictor, torch.randn(5, EMBEDDING), 0.5, 2).soft
    found = wired_nll(graph, windows, adjacency, 2)
    assert found.shape == (5, windows.seq_len)  # of the first five windows
    tokens, targets = windows.batch(range(5))
    for index in range(5):
        logits = graph(tokens[index : index + 1], adjacency[index : index + 1])
        torch.testing.assert_close(found[index : index + 1], token_nll(logits, targets[index : index + 1]))
    assert not torch.allclose(found, wired_nll(graph, windows, adjacency.flip(0), 2), atol=1e-3)


def test_batch_size_changes_nothing_but_the_last_bits(windows):
    graph, predictor = DagForward(make_base()), make_predictor()
    embeddings = torch.randn(len(windows), EMBEDDING)
    one, other = (wire(predictor, embeddings, 0.5, size) for size in (1, 8))
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    one, other = (wired_nll(graph, windows, one.soft, size) for size in (1, 8))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_noise_two_evaluations_are_the_same_to_the_bit(windows):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        graph, predictor = DagForward(make_base()), make_predictor()
        embeddings = torch.randn(len(windows), EMBEDDING, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(seed)  # a draw from the global generator would show
        wiring = wire(predictor, embeddings, 0.5, 4)
        results.append([*wiring, wired_nll(graph, windows, wiring.soft, 4), baseline_nll(graph, windows, 4).nll])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_wirings_are_what_the_predictor_says_and_hold_no_gradients():
    predictor = make_predictor()
    embeddings = torch.randn(3, EMBEDDING)
    wiring = wire(predictor, embeddings, 0.7, 3)
    assert torch.equal(wiring.logits, predictor.logits(embeddings))
    assert torch.equal(wiring.soft, predictor(embeddings, 0.7, "soft"))
    assert torch.equal(wiring.hard, predictor(embeddings, 0.7, "hard"))
    assert not any(part.requires_grad for part in wiring)
    assert 0 < wiring.hard[:, VALID].mean() < 1  # else these tests would show little


def test_tokens_are_counted_by_the_source_of_their_document(tmp_path):
    shards = write_tokens(tmp_path, [3, 4, 1, 1, 6])
    of_token = [source for length, source in ((3, 0), (4, 1), (1, 0), (1, 1), (6, 0)) for _ in range(length)]
    for start in range(15):
        for stop in range(start + 1, 16):
            expected = [of_token[start:stop].count(source) for source in (0, 1)]
            assert tokens_by_source(shards, start, stop).tolist() == expected


def rows(baseline: float, soft: float = 3.0) -> list[dict]:
    text = {"protocol": "window", "window": 4, "source": "ants", "tokens": 16}
    return [{**text, "nll_soft": soft, "nll_hard": soft, "nll_baseline": baseline}]


def test_variants_must_share_their_baseline_to_the_last_digit(tmp_path):
    paths = [tmp_path / f"{name}.csv" for name in "abc"]
    write_csv(paths[0], rows(3.1))
    write_csv(paths[1], rows(3.1, soft=2.0))
    check_same_baseline(paths[:2])
    write_csv(paths[2], rows(math.nextafter(3.1, 4)))
    with pytest.raises(DynarouteError, match=r"c\.csv: its baseline NLL or windows differ from those of .*a\.csv"):
        check_same_baseline(paths)
    write_csv(paths[2], [{**rows(3.1)[0], "window": 5}])
    with pytest.raises(DynarouteError, match=r"c\.csv"):
        check_same_baseline(paths)


def test_results_that_cannot_be_compared_are_refused_in_one_line(tmp_path):
    with pytest.raises(DynarouteError, match=r"a\.csv: cannot be read: No such file or directory: run stages"):
        check_same_baseline([tmp_path / "a.csv"])
    write_csv(tmp_path / "b.csv", [{"protocol": "window"}])
    with pytest.raises(DynarouteError, match=r"b\.csv: lacks the column 'window'"):
        check_same_baseline([tmp_path / "b.csv"])
