"""The structure predictor: its size, its initialisation, its gradients, and the noise of a sequence."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import make_variant

from dynaroute.dagformer.gates import cascade, dag_mask, gumbel_sigmoid
from dynaroute.dagformer.predictor import INITIAL_SPREAD, StructurePredictor, sequence_noise

L, H, E = 3, 2, 12
N = L * H
MASK = dag_mask(L, H)


def make(layers=L, heads=H, size=E, seed=0, **changes) -> StructurePredictor:
    torch.manual_seed(seed)
    return StructurePredictor(make_variant(**{"predictor_hidden": 16, **changes}), layers, heads, size)


def trained(**changes) -> StructurePredictor:
    """A float64 predictor far from its initialisation: gates of all sizes, different for every text."""
    predictor = make(**{"init_logit": 0.5, **changes}).double()
    if predictor.edges is not None:
        torch.nn.init.normal_(predictor.edges)
        return predictor
    for head in (predictor.u, predictor.v):
        torch.nn.init.normal_(head.bias, std=0.5)
        torch.nn.init.normal_(head.weight, std=0.3)
    return predictor


def texts(count=3, seed=1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(count, E, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("source", ["text", "none"])
def test_the_spread_at_initialisation_does_not_depend_on_rank_or_widths(source):
    valid = dag_mask(4, 8)
    for rank, hidden, size in itertools.product((2, 32), (128, 512), (32, 256)):
        changes = {"rank": rank, "predictor_hidden": hidden, "predictor_input": source}
        predictors = [make(4, 8, size, seed=seed, **changes) for seed in range(6)]
        logits = torch.stack([p.logits(torch.randn(4, size) * 40 + 7)[:, valid] for p in predictors]) - 15
        assert logits.square().mean().sqrt().item() == pytest.approx(INITIAL_SPREAD, rel=0.25), (rank, hidden, size)
        assert logits.mean().abs() < 0.1 * INITIAL_SPREAD


@pytest.mark.parametrize("rank", [1, 2, 64])
def test_at_initialisation_all_gates_are_open_and_nearly_equal(rank):
    predictor = make(8, 8, 128, rank=rank, predictor_hidden=256)
    valid, x = dag_mask(8, 8), torch.randn(16, 128)
    assert torch.equal(predictor(x, 5.0, "hard"), valid.float().expand(16, -1, -1))
    soft = predictor(x, 5.0, "soft")[:, valid]
    assert (soft - torch.sigmoid(torch.tensor(3.0))).abs().max() < 0.03


def test_logits_equal_their_formula():
    predictor, x = trained(), texts()
    expected = torch.full((3, N, N), -torch.inf, dtype=torch.float64)
    for text, row in enumerate(x):
        row = row / row.square().mean().sqrt()
        for linear in (predictor.first, predictor.second):
            row = F.gelu(linear.weight @ row + linear.bias)
        u = (predictor.u.weight @ row + predictor.u.bias).view(N, 2)
        v = (predictor.v.weight @ row + predictor.v.bias).view(N, 2)
        for i, j in MASK.nonzero().tolist():
            expected[text, i, j] = u[i] @ v[j] + 0.5
    torch.testing.assert_close(predictor.logits(x), expected, rtol=1e-6, atol=1e-6)  # init_logit was a float32


@pytest.mark.parametrize("mode", ["train", "soft", "hard"])
@pytest.mark.parametrize("gate", ["off", "fixed", "learnable"])
@pytest.mark.parametrize("exempt", [True, False])
def test_the_adjacency_is_the_gates_of_the_logits_after_the_cascade(mode, gate, exempt):
    predictor, x = trained(cascade=gate, cascade_k=1.5, exempt_first_layer=exempt), texts()
    noise = texts(3 * N * N // E, seed=2).view(3, N, N) if mode == "train" else None
    expected = gumbel_sigmoid(predictor.logits(x), 0.8, mode, noise)
    if gate != "off":
        expected = cascade(expected, 1.5, H, mode == "hard", exempt)
    found = predictor(x, 0.8, mode, noise)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # k = exp(log k) in float32
    assert (found[:, ~MASK] == 0).all()
    if mode == "hard":
        assert ((found == 0) | (found == 1)).all()
        assert 0 < found.mean() < MASK.double().mean()  # the weights were chosen to close some, not all


@pytest.mark.parametrize("source", ["none", "edges"])
def test_a_static_topology_is_the_same_for_all_texts_and_one_of_texts_is_not(source):
    static, text = trained(predictor_input=source), trained()
    logits = static.logits(texts(4))
    assert logits.shape == (4, N, N)
    assert all(torch.equal(logits[0], other) for other in [*logits, *static.logits(1e3 * texts(2, seed=5))])
    logits = text.logits(texts(4))
    assert (logits[0] - logits[1])[MASK].abs().min() > 1e-4


def test_free_edges_begin_at_the_initial_logit_and_learn_one_by_one():
    predictor = make(predictor_input="edges", init_logit=2.0)
    logits = predictor.logits(texts(3))
    assert (logits[:, MASK] == 2.0).all() and (logits[:, ~MASK] == -torch.inf).all()
    logits[0][MASK][5].backward()
    gradient = predictor.edges.grad
    assert (gradient[MASK] == torch.eye(int(MASK.sum()))[5]).all() and not gradient[~MASK].any()


def test_the_texts_of_a_batch_do_not_influence_each_other():
    predictor, x = trained(), texts(4)
    alone = torch.cat([predictor(row[None], 1.0, "soft") for row in x])
    torch.testing.assert_close(predictor(x, 1.0, "soft"), alone, rtol=1e-12, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(
    scales=st.lists(st.floats(-6, 6), min_size=E, max_size=E),
    shifts=st.lists(st.floats(-100, 100), min_size=E, max_size=E),
)
def test_after_fitting_neither_scale_nor_offset_of_a_feature_matters(scales, shifts):
    scale = 10 ** torch.tensor(scales, dtype=torch.float64)
    shift = scale * torch.tensor(shifts, dtype=torch.float64)
    one, other = trained(), trained()
    one.fit_normalisation(texts(50))
    other.fit_normalisation(texts(50) * scale + shift)
    x = texts(3, seed=2)
    torch.testing.assert_close(other.logits(x * scale + shift), one.logits(x), rtol=1e-6, atol=1e-6)


def test_a_feature_that_never_varies_is_ignored_and_few_rows_stand_for_many(monkeypatch):
    x = texts(64, dtype=torch.float32)
    x[:, 3] = 0.1
    predictor = make()
    predictor.fit_normalisation(x.numpy())
    changed = x.clone()
    changed[:, 3] = 1e6
    assert torch.equal(predictor.logits(x), predictor.logits(changed))
    monkeypatch.setattr("dynaroute.dagformer.predictor.STATISTICS_ROWS", 16)
    few = make()
    few.fit_normalisation(x)
    predictor.fit_normalisation(x[::4])
    assert torch.equal(few.embedding_mean, predictor.embedding_mean)


def test_weights_carry_the_statistics_of_the_normalisation():
    one, other = trained(), make(init_logit=0.5).double()
    one.fit_normalisation(3 + texts(20))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.logits(texts()), other.logits(texts()))


def test_hard_gates_have_no_gradient():
    assert not trained(cascade="learnable")(texts(), 1.0, "hard").requires_grad


@pytest.mark.parametrize("source", ["text", "none"])
def test_gradients_are_the_numerical_ones(source):
    predictor = trained(cascade="learnable", cascade_k=0.7, predictor_input=source, predictor_hidden=5, rank=2)
    noise = texts(2 * N * N // E, seed=2).view(2, N, N)
    parameters = dict(predictor.named_parameters())

    def adjacency(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(predictor, named, (x, 1.3, "train", noise))[:, MASK]

    x = texts(2).requires_grad_(source == "text")
    assert torch.autograd.gradcheck(adjacency, (x, *(value.detach().requires_grad_() for value in parameters.values())))


def test_a_learnable_k_starts_where_it_should_and_stays_positive():
    predictor = make(cascade="learnable", cascade_k=0.3, init_logit=-1.0)
    assert predictor.cascade_k.item() == pytest.approx(0.3)
    assert make().cascade_k == 5.0
    optimizer = torch.optim.SGD([predictor.log_k], lr=50.0)
    for _ in range(8):  # what all nodes send is to be small, so k falls as far as it can
        optimizer.zero_grad()
        predictor(texts(dtype=torch.float32), 1.0, "soft").sum().backward()
        optimizer.step()
        assert predictor.cascade_k > 0
    assert predictor.cascade_k < 0.03


def test_autocast_changes_nothing():
    predictor, x = make(init_logit=1.0), texts(dtype=torch.float32)
    expected = predictor(x, 1.0, "soft")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictor(x, 1.0, "soft"), expected)


def test_noise_depends_on_seed_step_and_window_and_on_nothing_else():
    noise = sequence_noise(3, 7, torch.tensor([5, 11, 2]), N)
    assert noise.shape == (3, N, N)
    assert noise.dtype == torch.float32
    torch.manual_seed(99)
    assert torch.equal(sequence_noise(3, 7, torch.tensor([2, 5]), N), noise[[2, 0]])
    others = [(3, 7, 11), (3, 8, 5), (4, 7, 5), (7, 3, 5), (3, 5, 7)]
    for seed, step, window in others:
        other = sequence_noise(seed, step, torch.tensor([window]), N)[0]
        assert (other != noise[0]).float().mean() > 0.9, (seed, step, window)


def test_noise_is_independent_across_windows_and_steps():
    noise = torch.stack([sequence_noise(0, step, torch.arange(8), 64) for step in range(4)]).flatten(0, 1)
    assert (noise < 1).double().mean().item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=5e-3)
    correlations = np.corrcoef(noise.flatten(1).numpy()) - np.eye(32)
    assert np.abs(correlations).max() < 5 / 64  # five standard deviations
