"""Learning rates and decay groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.training.schedules import decay_groups, warmup_cosine


def test_the_rate_equals_torch_linear_and_cosine_schedulers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 10, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=3e-5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[9])
    for step in range(100):
        expected = optimizer.param_groups[0]["lr"]
        assert warmup_cosine(step, 100, 10, 3e-4, 3e-5) == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        scheduler.step()


@given(total=st.integers(1, 500), warmup=st.integers(0, 500), step=st.integers(0, 499))
def test_the_rate_stays_between_zero_and_its_peak(total, warmup, step):
    rate = warmup_cosine(min(step, total - 1), total, warmup, 1.0, 0.1)
    assert 0 < rate <= 1.0 + 1e-12
    assert math.isfinite(rate)


def test_matrices_decay_and_biases_norms_and_embeddings_do_not():
    config = DWRConfig(
        d_model=16, d_ff=16, num_layers=2, num_heads=2, num_experts=3, top_k=2, max_seq_len=8, dropout=0.0,
        capacity_factor=None, vocab_size=64,
    )  # fmt: skip
    model = DWRTransformer(config)
    decay, plain = decay_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    kept = {names[id(parameter)] for parameter in plain["params"]}
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    expected = {name for name in names.values() if name.endswith((".w1", ".w2")) or name == "output.weight"}
    expected |= {n for n in names.values() if n.endswith(".weight") and ("attention." in n or "router" in n)}
    assert decayed == expected


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    decay, plain = decay_groups(model, 0.1)
    assert decay["params"] == []
    assert plain["params"] == [model.bias]
