import pytest
import torch

from dynaroute.dagformer.gates import (
    cascade,
    dag_mask,
    density,
    gate_fraction,
    gumbel_sigmoid,
    hold_share,
    layer_distance,
    logistic_noise,
)
from dynaroute.errors import DynarouteError

L, H = 4, 3
N = L * H


def logits(seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def open_gates() -> torch.Tensor:
    return dag_mask(L, H).double()[None]


def test_the_paper_size_has_30720_valid_entries_of_which_3840_are_adjacent():
    distance = layer_distance(16, 16)
    assert dag_mask(16, 16).sum() == 30_720
    assert (distance == 1).sum() == 3_840
    assert (distance > 1).sum() == 26_880


def test_only_a_later_layer_receives():
    mask = dag_mask(L, H)
    for i in range(N):
        for j in range(N):
            assert mask[i, j] == (j // H > i // H)


def test_means_are_over_valid_entries_only():
    assert density(open_gates(), dag_mask(L, H)).tolist() == [1.0]
    half = open_gates() * 0.5
    half[:, :H, H : 2 * H] = 0.75  # opens the first of the three blocks between adjacent layers
    assert gate_fraction(half, layer_distance(L, H) == 1).tolist() == pytest.approx([1 / 3])
    assert gate_fraction(half, layer_distance(L, H) > 1).tolist() == [0.0]


def test_soft_and_hard_gates_follow_their_formulas():
    z = logits()
    assert torch.equal(gumbel_sigmoid(z, 0.7, "soft"), torch.sigmoid(z / 0.7))
    assert torch.equal(gumbel_sigmoid(z, 0.7, "hard"), (z > 0).double())
    noise = logits(1)
    assert torch.equal(gumbel_sigmoid(z, 2.0, "train", noise), torch.sigmoid((z + noise) / 2.0))


def test_noise_is_logistic_and_decided_by_the_generator_alone():
    def draw(seed: int) -> torch.Tensor:
        return logistic_noise((200_000,), torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    assert first.isfinite().all()
    for x in (-2.0, 0.0, 1.0):  # the logistic's distribution function is the sigmoid
        assert (first < x).double().mean().item() == pytest.approx(torch.sigmoid(torch.tensor(x)).item(), abs=5e-3)


@pytest.mark.parametrize("mode", ["train", "soft", "hard"])
def test_entries_of_minus_infinity_are_closed_and_get_no_gradient(mode):
    mask = dag_mask(L, H)
    z = logits().requires_grad_()
    noise = logits(1) if mode == "train" else None
    gates = gumbel_sigmoid(z.masked_fill(~mask, -torch.inf), 0.5, mode, noise)
    assert (gates[:, ~mask] == 0).all()
    if mode != "hard":
        gates.sum().backward()
        assert (z.grad[:, ~mask] == 0).all()
        assert (z.grad[:, mask] != 0).all()


def test_gradients_of_gates_and_cascade_are_exact():
    z = logits(batch=1)[:, :6, :6].clone().requires_grad_()
    noise, tau = logits(1, 1)[:, :6, :6], torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, tau: gumbel_sigmoid(z, tau, "train", noise), (z, tau))
    assert torch.autograd.gradcheck(lambda z, tau: gumbel_sigmoid(z, tau, "soft"), (z, tau))
    adjacency = torch.sigmoid(z).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, k: cascade(a, k, 2, hard=False), (adjacency, tau))


@pytest.mark.parametrize("tau", [1e-6, 1e6])
@pytest.mark.parametrize("mode", ["train", "soft", "hard"])
def test_gates_and_gradients_are_finite_at_the_ends_of_the_settings(tau, mode):
    sizes = [0.0, 1e-30, 1e-6, 1.0, 1e6]  # the last is the largest init_logit
    z = torch.tensor([*sizes, *(-size for size in sizes)], requires_grad=True)
    noise = torch.zeros(()) if mode == "train" else None
    gates = gumbel_sigmoid(z, tau, mode, noise)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert (gates[:5] >= gates[5:]).all()
    if mode != "hard":
        (gradient,) = torch.autograd.grad(gates.sum(), z)
        assert gradient.isfinite().all()
        assert gradient[0].item() == pytest.approx(0.25 / tau)
        adjacency = gumbel_sigmoid(logits().float().requires_grad_(), tau, mode, noise)
        (gradient,) = torch.autograd.grad(cascade(adjacency, 1e6, H, hard=False).sum(), adjacency)
        assert gradient.isfinite().all()


def test_the_cascade_scales_what_a_node_sends_by_what_it_receives():
    adjacency = torch.sigmoid(logits()) * dag_mask(L, H)
    gated = cascade(adjacency, 5.0, H, hard=False)
    assert torch.equal(gated[:, :H], adjacency[:, :H])
    for j in range(H, N):
        expected = adjacency[:, j] * torch.sigmoid(5.0 * adjacency[:, :, j].sum(-1, keepdim=True))
        torch.testing.assert_close(gated[:, j], expected, rtol=1e-12, atol=0)


def test_a_hard_cascade_silences_exactly_the_nodes_that_receive_nothing():
    adjacency = open_gates()
    assert torch.equal(cascade(adjacency, 5.0, H, hard=True), adjacency)
    deaf = 2 * H + 1
    adjacency[:, :, deaf] = 0
    expected = adjacency.clone()
    expected[:, deaf] = 0
    assert torch.equal(cascade(adjacency, 5.0, H, hard=True), expected)


def test_without_the_exemption_a_hard_cascade_cuts_layer_0_off():
    gated = cascade(open_gates(), 5.0, H, hard=True, exempt_first_layer=False)
    assert (gated[:, :H] == 0).all()
    assert torch.equal(gated[:, H:], open_gates()[:, H:])


def test_the_cascade_does_not_count_entries_that_are_not_valid():
    adjacency = torch.sigmoid(logits())
    mask = dag_mask(L, H)
    assert torch.equal(cascade(adjacency, 5.0, H, hard=False), cascade(adjacency * mask, 5.0, H, hard=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gumbel_sigmoid(logits(), 1.0, "sample"), "mode = 'sample': must be one of train, soft, hard"),
        (lambda: gumbel_sigmoid(logits(), 1.0, "train"), "noise must be given in mode train"),
        (lambda: gumbel_sigmoid(logits(), 1.0, "soft", logits()), "and in no other"),
        (lambda: gumbel_sigmoid(logits(), 0.0, "soft"), "tau = 0.0: must be above 0"),
        (lambda: cascade(open_gates(), 5.0, 5, hard=False), "num_heads = 5: must divide the 12 nodes"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(DynarouteError, match=message):
        call()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_held_share_is_the_expected_share_of_open_gates_in_training_and_exact_outside_of_it(share):
    mask, raw = dag_mask(L, H), 4 * logits(batch=3) + 2
    held = hold_share(raw, mask, share, "train")
    torch.testing.assert_close(torch.sigmoid(held)[:, mask].mean(-1), torch.full((3,), share, dtype=torch.float64))
    torch.testing.assert_close(held - held[:, :1, :1], raw - raw[:, :1, :1])  # less one number
    for mode in ("soft", "hard"):
        opened = (hold_share(raw, mask, share, mode) > 0)[:, mask]
        assert opened.sum(-1).tolist() == [round(share * int(mask.sum()))] * 3
        assert all(values[on].min() > values[~on].max() for values, on in zip(raw[:, mask], opened, strict=True))


def test_the_gradient_of_a_held_share_is_that_of_its_solution():
    mask = dag_mask(L, H)
    assert torch.autograd.gradcheck(lambda raw: hold_share(raw, mask, 0.7, "train"), logits(batch=2).requires_grad_())


@pytest.mark.parametrize("mode", ["train", "soft", "hard"])
def test_equal_gates_stay_equal_when_a_share_is_held(mode):
    held = hold_share(torch.full((1, N, N), 2.0), dag_mask(L, H), 0.8, mode)
    assert len(held.unique()) == 1
    expected = torch.logit(torch.tensor(0.8)) if mode == "train" else torch.tensor(0.0)
    torch.testing.assert_close(held[0, 0, 0], expected, atol=1e-5, rtol=1e-5)
