"""Losses and choices that favour experts used before, against plain loops."""

import math

import pytest
import torch
from small_store import make_model
from small_training import VOCAB, Tokens

from dynaroute.dwr.locality import reuse_loss
from dynaroute.dwr.objective import DWRObjective
from dynaroute.training.loop import Batch


def draw(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_batch(windows) -> Batch:
    return Batch(*Tokens(9).batch(windows), torch.tensor(windows))


# --- the reuse loss -------------------------------------------------------------------------------------------------


def plain_means(probabilities, half_life):
    """The exponential mean of what came before each token of one sequence, by one pass over it."""
    total, weight, means = [0.0] * len(probabilities[0]), 0.0, []
    for p in probabilities:
        means.append([value / weight for value in total] if weight else None)
        total = [0.5 ** (1 / half_life) * value + own for value, own in zip(total, p, strict=True)]
        weight = 0.5 ** (1 / half_life) * weight + 1
    return means


@pytest.mark.parametrize("half_life", [0.001, 1.0, 5.0, 1e6])
def test_the_reuse_loss_is_the_divergence_from_a_running_mean_and_its_gradient_the_difference_to_it(half_life):
    scores = draw(2, 9, 4).requires_grad_()
    found = reuse_loss(scores, half_life)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    for sequence in range(2):
        probabilities = scores[sequence].softmax(-1).tolist()
        assert found[sequence, 0] == 0
        for token, mean in enumerate(plain_means(probabilities, half_life)):
            p = probabilities[token]
            mean = mean or p  # the first token
            expected = sum(m * math.log(m / own) for m, own in zip(mean, p, strict=True))
            assert found[sequence, token].item() == pytest.approx(expected, abs=1e-12)
            assert gradient[sequence, token].tolist() == pytest.approx(
                [own - m for own, m in zip(p, mean, strict=True)], abs=1e-12
            )


def test_the_reuse_loss_of_a_token_does_not_depend_on_later_tokens_nor_on_other_sequences():
    scores = draw(3, 9, 4)
    changed = scores.clone()
    changed[0, 5:] += 1 + draw(4, 4, seed=1)
    changed[1] += draw(9, 4, seed=2)
    one, other = reuse_loss(scores, 3.0), reuse_loss(changed, 3.0)
    assert torch.equal(one[0, :5], other[0, :5])
    assert torch.equal(one[2], other[2])
    assert (one[0, 5:] != other[0, 5:]).all()


def test_the_reuse_loss_is_added_as_often_as_it_has_weight_and_takes_text_of_one_token():
    model, batch = make_model(vocab_size=VOCAB, dropout=0.0), make_batch([0, 1])
    without, _ = DWRObjective(model.config, 0.01).loss(model, batch, 0)
    objective = DWRObjective(model.config, 0.01, reuse_coefficient=0.5, reuse_half_life=2.0)
    found, metrics = objective.loss(model, batch, 0)
    expected = [reuse_loss(layer.scores, 2.0).mean() for layer in model(batch.tokens).router]
    assert [metrics[f"reuse_loss_layer{layer}"] for layer in range(2)] == expected
    torch.testing.assert_close(found, without + 0.5 * sum(expected))
    assert torch.equal(reuse_loss(draw(2, 1, 4), 2.0), torch.zeros(2, 1, dtype=torch.float64))
