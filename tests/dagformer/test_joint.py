"""A base trained jointly with its predictor: two learning rates, and a baseline that is the base trained by itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resuming import killed_at
from small_base import EMBEDDING, HEADS, LAYERS, make_base
from test_objective import STEPS, WINDOWS, RandomWindows, make_variant

from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.joint import JointModel
from dynaroute.dagformer.objective import DagObjective
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.errors import DynarouteError
from dynaroute.training.loop import Trainer, make_accelerator
from dynaroute.training.schedules import decay_groups, warmup_cosine

OPEN = {"init_logit": 10000.0, "cascade": "off"}  # no gate can leave 1


def train(scratch, seed=0, **knobs):
    """Trains jointly; returns the trainer, which has the model, and the objective."""
    variant = make_variant(**{"base_lr": 1e-2, **knobs})
    embeddings = torch.randn(2, WINDOWS, EMBEDDING, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    predictor = StructurePredictor(variant, LAYERS, HEADS, EMBEDDING)
    predictor.fit_normalisation(embeddings[0])
    graph, dense = DagForward(make_base(), variant.input_norm, trainable=True), DagForward(make_base())
    objective = DagObjective(graph, variant, *embeddings, variant.seed, dense)
    model = JointModel(predictor, graph.base)
    trainer = Trainer(
        model, objective, RandomWindows(0), RandomWindows(1), variant, total_steps=STEPS,
        accelerator=make_accelerator("cpu", "fp32"), seed=variant.seed, scratch=scratch,
        parameter_groups=model.parameter_groups(),
    )  # fmt: skip
    with trainer:
        trainer.run()
    return trainer, objective


def test_with_gates_that_cannot_close_it_is_the_base_trained_by_itself(tmp_path):
    """Against a plain loop over transformers' own model."""
    trainer, objective = train(tmp_path, **OPEN)
    variant, base, windows = objective.variant, make_base().requires_grad_(), RandomWindows(0)
    optimizer = torch.optim.AdamW(decay_groups(base, variant.weight_decay), lr=1e-2, betas=tuple(variant.betas))
    for step in range(STEPS):
        epoch, position = divmod(step, WINDOWS // 4)
        order = np.random.default_rng([variant.seed, epoch]).permutation(WINDOWS)
        tokens, targets = windows.batch(order[position * 4 : position * 4 + 4])
        optimizer.zero_grad()
        F.cross_entropy(base(tokens).logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), variant.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, STEPS, variant.warmup_steps, 1e-2, 0.0)
        optimizer.step()
    for (name, ours), theirs in zip(trainer.model.base.named_parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    first, last = trainer.state.history[0], trainer.state.history[-1]
    assert last["validation_mean_A"] == last["validation_density_hard"] == 1
    assert last["validation_nll_soft"] == last["validation_nll_hard"]
    assert last["validation_nll_hard"] != first["validation_nll_hard"]


def test_predictor_and_base_both_change_and_the_baseline_does_not(tmp_path):
    trainer, objective = train(tmp_path, init_logit=1.0, tau_final=2.0)
    untrained = dict(make_base().named_parameters())
    assert not any(torch.equal(value, untrained[name]) for name, value in trainer.model.base.named_parameters())
    assert all(map(torch.equal, objective.dense.base.parameters(), untrained.values()))
    assert all(parameter.grad is None for parameter in objective.dense.base.parameters())
    baselines = {row["validation_nll_baseline"] for row in trainer.state.history}
    assert len(baselines) == 1
    assert len({row["validation_mean_A"] for row in trainer.state.history}) > 1


@pytest.mark.parametrize(("base_lr", "factor"), [(1e-4, 1e-4 / 3e-3), (3e-3, 1.0)])
def test_each_part_has_its_learning_rate(tmp_path, base_lr, factor):
    trainer, _ = train(tmp_path, lr=3e-3, base_lr=base_lr)
    model, rates = trainer.model, {}
    for group in trainer.optimizer.param_groups:
        rates |= {id(parameter): group.get("lr_factor", 1.0) for parameter in group["params"]}
    assert {rates[id(parameter)] for parameter in model.predictor.parameters()} == {1.0}
    assert [rates[id(p)] for p in model.base.parameters()] == pytest.approx(
        [factor] * len(list(model.base.parameters()))
    )
    assert len(rates) == len(list(model.parameters()))


def test_a_base_with_tied_embeddings_is_refused_before_training():
    base = make_base()
    base.lm_head.weight = base.model.embed_tokens.weight
    with pytest.raises(DynarouteError, match=r"^dagformer.base: has tied embeddings \(lm_head.weight\): it cannot be"):
        JointModel(torch.nn.Linear(1, 1), base)


@pytest.mark.parametrize("crash_at", [2, 5])
def test_a_joint_run_resumed_after_a_crash_ends_bit_for_bit_as_one_that_never_crashed(tmp_path, crash_at):
    whole, _ = train(tmp_path / "whole")
    with killed_at(DagObjective, "loss", crash_at):
        train(tmp_path / "resumed")
    resumed, _ = train(tmp_path / "resumed", seed=9)
    assert resumed.last_path.read_bytes() == whole.last_path.read_bytes()
