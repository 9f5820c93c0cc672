"""What the predictor is trained on: the loss as DESIGN writes it, on a base that never changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from resuming import killed_at
from small_base import EMBEDDING, HEADS, LAYERS, SEQ_LEN, VOCABULARY, make_base
from small_settings import changed, default_settings

from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.health import health
from dynaroute.dagformer.objective import DagObjective, lambda_at, tau_at
from dynaroute.dagformer.predictor import StructurePredictor, sequence_noise
from dynaroute.training.loop import Batch, Trainer, make_accelerator

WINDOWS, STEPS = 12, 10


class RandomWindows:
    """Windows of random tokens, as the trainer takes them."""

    def __init__(self, seed: int) -> None:
        self.data = torch.randint(VOCABULARY, (WINDOWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))
        self.seq_len = SEQ_LEN

    def __len__(self) -> int:
        return WINDOWS

    def batch(self, indices):
        return self.data[list(indices), :-1], self.data[list(indices), 1:]


def make_variant(**knobs):
    small = {"predictor_hidden": 8, "rank": 2, "steps": STEPS, "batch_size": 4, "micro_batch_size": 4}
    small |= {"validate_every": 5, "checkpoint_every": 3}
    return changed(default_settings().variant("P1"), **{**small, **knobs})


def make(base=None, seed=0, **knobs):
    """A predictor and its objective."""
    variant = make_variant(**knobs)
    embeddings = torch.randn(2, WINDOWS, EMBEDDING, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    predictor = StructurePredictor(variant, LAYERS, HEADS, EMBEDDING)
    predictor.fit_normalisation(embeddings[0])
    graph = DagForward(make_base() if base is None else base, variant.input_norm)
    return predictor, DagObjective(graph, variant, *embeddings, noise_seed=variant.seed)


def batch_of(windows, indices) -> Batch:
    return Batch(*windows.batch(indices), torch.tensor(list(indices)))


def train(scratch, objective, predictor, start=None):
    trainer = Trainer(
        predictor, objective, RandomWindows(0), RandomWindows(1), objective.variant, total_steps=STEPS,
        accelerator=make_accelerator("cpu", "fp32"), seed=objective.variant.seed, scratch=scratch, start=start,
    )  # fmt: skip
    with trainer:
        trainer.run()
    return trainer


@torch.no_grad()
def validate(objective, predictor):
    return objective.validation_metrics(
        objective.validation_sums(predictor, batch_of(RandomWindows(1), range(WINDOWS)), 0)
    )


def test_tau_is_half_a_cosine_and_lambda_rises_over_the_first_fifth():
    variant = make_variant(tau_init=5.0, tau_final=1.0, lambda_init=0.1, lambda_final=0.5)
    assert [tau_at(step, 100, variant) for step in (0, 50, 100)] == pytest.approx([5.0, 3.0, 1.0])
    assert tau_at(25, 100, variant) == pytest.approx(1 + 4 * (1 + math.cos(math.pi / 4)) / 2)
    weights = [lambda_at(step, 100, variant) for step in (0, 5, 10, 20, 60, 100)]
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("step", [0, 1, 7])
def test_the_loss_is_the_nll_of_the_wired_base_plus_lambda_times_mean_a(step):
    predictor, objective = make(lambda_init=0.3, lambda_final=2.0)
    batch = batch_of(RandomWindows(0), [3, 7, 8])
    loss, metrics = objective.loss(predictor, batch, step)
    tau, weight = tau_at(step, STEPS, objective.variant), lambda_at(step, STEPS, objective.variant)
    noise = sequence_noise(objective.noise_seed, step, batch.windows, LAYERS * HEADS)
    nll, means = [], []
    for row, window in enumerate(batch.windows):  # one by one, as the formulas are written
        embedding = objective.training_embeddings[window][None]
        adjacency = predictor(embedding, tau, "train", noise[row][None])
        logits = objective.graph(batch.tokens[row][None], adjacency)[0]
        nll.append(-F.log_softmax(logits, -1)[range(SEQ_LEN), batch.targets[row]].mean())
        means.append(adjacency[0][dag_mask(LAYERS, HEADS)].mean())
    expected = torch.stack(nll).mean() + weight * torch.stack(means).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["loss"], torch.stack(nll).mean())
    torch.testing.assert_close(metrics["mean_A"], torch.stack(means).mean())


def test_the_loss_may_be_the_divergence_from_the_base():
    predictor, objective = make(loss="kl", lambda_init=0.02, lambda_final=0.02, init_logit=1.0)
    batch = batch_of(RandomWindows(0), range(4))
    total, metrics = objective.loss(predictor, batch, 3)
    noise = sequence_noise(objective.noise_seed, 3, batch.windows, LAYERS * HEADS)
    adjacency = predictor(objective.training_embeddings[:4], tau_at(3, STEPS, objective.variant), "train", noise)
    wired = torch.distributions.Categorical(logits=objective.graph(batch.tokens, adjacency))
    base = torch.distributions.Categorical(logits=make_base()(batch.tokens).logits)
    divergence = torch.distributions.kl_divergence(base, wired).mean()
    assert total.item() == pytest.approx((divergence + 0.02 * metrics["mean_A"]).item(), rel=1e-4)
    assert metrics["loss"].item() == pytest.approx(
        F.cross_entropy(wired.logits.flatten(0, 1), batch.targets.flatten()).item(), rel=1e-5
    )


def test_the_gradient_at_the_gates_is_recorded_by_the_backward_pass():
    predictor, objective = make(lambda_final=0.0)
    batch = batch_of(RandomWindows(0), [0, 5])
    loss, metrics = objective.loss(predictor, batch, 2)
    (loss / 2).backward()  # as the loop does with two micro-batches of a batch of four
    noise = sequence_noise(objective.noise_seed, 2, batch.windows, LAYERS * HEADS)
    tau = tau_at(2, STEPS, objective.variant)
    adjacency = predictor(objective.training_embeddings[batch.windows], tau, "train", noise).detach().requires_grad_()
    F.cross_entropy(objective.graph(batch.tokens, adjacency).flatten(0, 1), batch.targets.flatten()).backward()
    of_windows = 2 * adjacency.grad.flatten(1).norm(dim=1)  # the loss is a mean over two windows
    torch.testing.assert_close(metrics["gate_gradient"], of_windows.square().mean().sqrt())


@pytest.mark.parametrize("input_norm", ["none", "rms_post"])
def test_the_baseline_is_the_loss_of_transformers_whatever_the_input_norm(input_norm):
    base = make_base()
    predictor, objective = make(base, input_norm=input_norm)
    metrics = validate(objective, predictor)
    stream = RandomWindows(1).data  # transformers shifts the labels by itself
    expected = base(stream, labels=stream).loss
    assert metrics["nll_baseline"] == pytest.approx(float(expected), abs=1e-5)


def test_training_changes_every_tensor_of_the_predictor_and_no_bit_of_the_base(tmp_path):
    base = make_base()
    before = [parameter.clone() for parameter in base.parameters()]
    predictor, objective = make(base, cascade="learnable")
    untrained = {name: value.clone() for name, value in predictor.named_parameters()}
    train(tmp_path, objective, predictor)
    assert all(map(torch.equal, base.parameters(), before))
    assert all(parameter.grad is None for parameter in base.parameters())
    assert {name for name, value in predictor.named_parameters() if torch.equal(value, untrained[name])} == set()


def test_training_lowers_the_training_loss(tmp_path):
    predictor, objective = make(init_logit=0.0, lr=1e-2, tau_final=5.0, lambda_final=0.0)
    batch = batch_of(RandomWindows(0), range(WINDOWS))
    before = objective.loss(predictor, batch, 0)[0].item()
    for number in range(3):
        train(tmp_path / str(number), objective, predictor)
    assert objective.loss(predictor, batch, 0)[0].item() < before


@pytest.mark.parametrize(
    "knobs",
    [
        {"lambda_init": 1e6, "lambda_final": 1e6, "lr": 10.0, "min_lr": 10.0, "init_logit": 1.0},
        {"tau_init": 1e-6, "tau_final": 1e-6},
        {"init_logit": 1e6},
    ],
    ids=["lambda", "tau", "logit"],
)
def test_the_extremes_of_the_settings_end_finite_and_are_named(tmp_path, knobs):
    predictor, objective = make(**knobs)
    history = train(tmp_path, objective, predictor).state.history
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert health(history, 5)[0] in ("collapsed", "saturated")
    assert all(value.isfinite().all() for value in predictor.state_dict().values())


@pytest.mark.parametrize("crash_at", [0, 2, 5, 9])
def test_a_run_resumed_after_a_crash_ends_bit_for_bit_as_one_that_never_crashed(tmp_path, crash_at):
    predictor, objective = make()
    whole = train(tmp_path / "whole", objective, predictor)
    predictor, objective = make()
    with killed_at(objective, "loss", crash_at):
        train(tmp_path / "resumed", objective, predictor)
    predictor, objective = make(seed=9)  # whatever a new process would draw, the checkpoint replaces
    resumed = train(tmp_path / "resumed", objective, predictor)
    assert resumed.last_path.read_bytes() == whole.last_path.read_bytes()


def test_what_continues_a_run_starts_at_its_final_weights(tmp_path):
    predictor, objective = make(tau_final=2.0)
    first = train(tmp_path / "first", objective, predictor)
    predictor, objective = make(tau_init=2.0, tau_final=2.0, seed=9)
    second = train(tmp_path / "second", objective, predictor, start=first.last_path)
    names = ("validation_nll_soft", "validation_nll_hard", "validation_mean_A", "validation_tau")
    end, start = first.state.history[-1], second.state.history[0]
    assert [start[name] for name in names] == [end[name] for name in names]


@pytest.mark.parametrize("exempt", [True, False])
def test_the_slope_is_that_of_the_gates_before_the_cascade(exempt):
    predictor, objective = make(exempt_first_layer=exempt)
    batch = batch_of(RandomWindows(0), [0, 5])
    noise = sequence_noise(objective.noise_seed, 1, batch.windows, LAYERS * HEADS)
    logits = predictor.logits(objective.training_embeddings[batch.windows]).detach().requires_grad_()
    torch.sigmoid((logits + noise) / tau_at(1, STEPS, objective.variant)).sum().backward()
    expected = logits.grad[:, dag_mask(LAYERS, HEADS)].mean()
    torch.testing.assert_close(objective.loss(predictor, batch, 1)[1]["gate_slope"], expected)
