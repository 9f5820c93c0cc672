"""What fills up the last window of a split counts nowhere."""

import numpy as np
import pytest
import torch
from small_store import make_model
from small_tokens import write_tokens

from dynaroute.analysis.traces import record_routing
from dynaroute.data.tokens.shards import IGNORED_TARGET, TokenShards, Windows
from dynaroute.dwr.objective import DWRObjective
from dynaroute.training.loop import Batch

T = 8


@pytest.fixture(params=[2, 5, 8, 9, 13], ids="{} tokens".format)
def split(tmp_path, request):
    """Windows of a split, the last one padded, and its tokens."""
    stream = np.random.default_rng(0).integers(1, 60, request.param).tolist()
    write_tokens(tmp_path, 60, validation=[stream])
    windows = Windows(TokenShards(tmp_path, "validation"), T, keep_tail=True)
    return windows, stream


@torch.no_grad()
def routing_of(model, stream):
    """Experts [L, tokens, K] and probabilities [L, tokens, E] of all tokens but the last, window by window."""
    passes = [model(torch.tensor([stream[start:][:T]])).router for start in range(0, len(stream) - 1, T)]
    parts = [[torch.cat([getattr(layer, name)[0] for layer in layers]) for layers in zip(*passes, strict=True)]
             for name in ("chosen", "probability")]  # fmt: skip
    return [torch.stack(part)[:, : len(stream) - 1] for part in parts]


def test_router_statistics_of_a_validation_are_of_real_tokens(split):
    windows, stream = split
    model = make_model(max_seq_len=T)
    objective = DWRObjective(model.config, 0.01)
    tokens, targets = windows.batch(range(len(windows)))
    with torch.no_grad():
        sums = objective.validation_sums(model, Batch(tokens, targets, torch.arange(len(windows))), step=0)
    chosen, probability = routing_of(model, stream)
    assert sums["predicted"] == (targets != IGNORED_TARGET).sum() == len(stream) - 1
    for layer in range(2):
        assert sums["assigned"][layer].tolist() == chosen[layer].flatten().bincount(minlength=5).tolist()
    torch.testing.assert_close(sums["probability"], probability.double().sum(1), rtol=1e-5, atol=1e-6)
    share, mean = sums["assigned"] / (len(stream) - 1), probability.double().mean(1)
    for layer, expected in enumerate(5 * (share * mean).sum(1) / 2):
        assert objective.validation_metrics(sums)[f"balance_layer{layer}"] == pytest.approx(float(expected), rel=1e-5)


def test_a_trace_is_of_real_tokens(split):
    windows, stream = split
    model = make_model(max_seq_len=T)
    trace = record_routing(model, windows, "run")
    chosen, _ = routing_of(model, stream)
    assert torch.equal(torch.tensor(trace.experts.astype(int)).transpose(0, 1), chosen)
    assert len(trace.lookahead) == len(stream) - 1
