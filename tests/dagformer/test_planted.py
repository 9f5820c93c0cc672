"""The planted base is trained as its docstring says, and the gates that are tried on it follow their formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_base import HEADS, LAYERS, SEQ_LEN, VOCABULARY, make_base
from small_settings import changed, default_settings
from test_objective import WINDOWS, RandomWindows, batch_of, make, make_variant

from dynaroute.dagformer.gates import dag_mask, gate_slope, gumbel_sigmoid, logistic_noise
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.planted import PlantedObjective, load_masks, plant_masks, save_masks
from dynaroute.dagformer.predictor import sequence_signs
from dynaroute.dagformer.training import make_trainer
from dynaroute.data.tokens.documents import window_sources
from dynaroute.errors import DynarouteError
from dynaroute.training.loop import Batch

VALID = dag_mask(LAYERS, HEADS)
SOURCES = torch.tensor([0, 2, 1, 2])


def settings(**changes):
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "contrast_from": 1}
    return changed(default_settings().dagformer.planted, **sizes | changes)


@pytest.fixture
def objective():
    graph = DagForward(make_base(), trainable=True)
    return PlantedObjective(graph, settings(), plant_masks(settings(), 3, 0), SOURCES, SOURCES)


def batch() -> Batch:
    tokens = torch.randint(VOCABULARY, (4, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(4))


def nll(graph, wiring) -> torch.Tensor:
    tokens, targets, _ = batch()
    return F.cross_entropy(graph(tokens, wiring).mT, targets, reduction="none").mean(1)


def test_masks_open_their_share_of_valid_edges_and_differ(tmp_path):
    masks = plant_masks(settings(open_share=0.25), 3, 0)
    assert not masks[:, ~VALID].any()
    assert masks[:, VALID].sum(1).tolist() == [round(0.25 * int(VALID.sum()))] * 3
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 3
    save_masks(tmp_path, masks, ["a", "b", "c"])
    stored, names = load_masks(tmp_path)
    assert torch.equal(stored, masks) and names == ["a", "b", "c"]


def test_without_masks_it_is_no_planted_base(tmp_path):
    with pytest.raises(DynarouteError, match=r"masks\.safetensors"):
        load_masks(tmp_path)


def test_every_text_is_trained_under_the_mask_of_its_source(objective):
    loss, record = objective.loss(None, batch(), 0)
    expected = nll(objective.graph, objective.masks[SOURCES]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert record["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("step", "wrong"), [(1, None), (2, 1), (3, 2), (4, None)], ids=str)
def test_wrong_wirings_take_turns_and_are_kept_worse_by_the_margin_at_most(objective, step, wrong):
    own = nll(objective.graph, objective.masks[SOURCES])
    wiring = VALID.float().expand(4, -1, -1) if wrong is None else objective.masks[(SOURCES + wrong) % 3]
    kept = torch.minimum(nll(objective.graph, wiring), own + objective.settings.margin)
    loss, _ = objective.loss(None, batch(), step)
    assert loss.item() == pytest.approx((own - objective.settings.contrast * kept).mean().item(), rel=1e-5)


def test_validation_reports_the_own_mask_and_all_gates_open(objective):
    with torch.no_grad():
        metrics = objective.validation_metrics(objective.validation_sums(None, batch(), 0))
    assert metrics["loss"] == pytest.approx(nll(objective.graph, objective.masks[SOURCES]).mean().item(), rel=1e-6)
    opened = nll(objective.graph, VALID.float().expand(4, -1, -1))
    assert metrics["all_gates_one"] == pytest.approx(opened.mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "straight_through", "hard_concrete"])
def test_gates_of_every_kind_follow_their_formula_and_slope(kind):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, generator=generator, dtype=torch.float64)).requires_grad_()
    noise, tau = logistic_noise((40,), generator).double(), 0.7
    gates = gumbel_sigmoid(logits, tau, "train", noise, kind)
    plain = torch.sigmoid((logits + noise) / tau)
    values = {
        "logistic": plain,
        "straight_through": (plain > 0.5).double(),
        "hard_concrete": torch.clamp(1.2 * plain - 0.1, 0, 1),
    }
    assert torch.allclose(gates, values[kind], atol=1e-12)
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    assert torch.allclose(gradient, gate_slope(logits, tau, noise, kind), atol=1e-12)
    if kind == "hard_concrete":
        assert (gates == 0).any() and (gates == 1).any()
    else:  # the published gradient
        assert torch.allclose(gradient, plain * (1 - plain) / tau, atol=1e-12)


def test_hard_gates_do_not_depend_on_the_kind():
    logits = torch.tensor([-1.0, 0.0, 2.0])
    for kind in ("logistic", "straight_through", "hard_concrete"):
        assert gumbel_sigmoid(logits, 1.0, "hard", kind=kind).tolist() == [0, 0, 1]


def test_a_flipped_gradient_is_that_of_each_window_times_a_sign_of_seed_step_and_window():
    windows, plain = RandomWindows(0), make(lambda_final=0.0)
    predictor, flipped = make(lambda_final=0.0, flip_gradients=True)

    def gradient(objective, indices):
        return torch.autograd.grad(objective.loss(predictor, batch_of(windows, indices), 2)[0], predictor.u.weight)[0]

    signs = sequence_signs(flipped.noise_seed, 2, torch.arange(WINDOWS))
    assert set(signs.tolist()) == {-1, 1}
    for indices in (range(WINDOWS), [7, 2]):
        own = [signs[index] * gradient(plain[1], [index]) for index in indices]
        torch.testing.assert_close(gradient(flipped, indices), torch.stack(own).mean(0))
    assert not torch.equal(signs, sequence_signs(flipped.noise_seed, 3, torch.arange(WINDOWS)))


def test_a_base_is_trained_jointly_by_one_process(tmp_path):
    with pytest.raises(
        DynarouteError, match=r"^variants\.V\.base_lr = 0\.01: 2 processes: such a variant is trained by one"
    ):
        variant = make_variant(base_lr=0.01)
        make_trainer(default_settings(), "V", "base", variant, tmp_path, SimpleNamespace(num_processes=2))


def test_windows_of_a_batch_that_straddle_documents_count_to_the_longer_one():
    shards = SimpleNamespace(offsets=torch.tensor([0, 5, 16]).numpy(), document_sources=torch.tensor([1, 0]).numpy())
    assert window_sources(shards, 8, [0, 1]).tolist() == [1, 0]
