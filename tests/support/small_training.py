"""A tiny model, its text and a trainer of it, for the tests of the training loop."""

import os
import signal

import torch
import torch.nn.functional as F
from torch import nn

from dynaroute.config.training import Training
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.dwr.objective import DWRObjective
from dynaroute.training.checkpoints import load_checkpoint
from dynaroute.training.loop import Trainer, make_accelerator

VOCAB, SEQ_LEN = 13, 6
LOCALITY = {"balance": "loss_free", "coefficient": 0.0, "balance_window": 4, "balance_rate": 0.01}
LOCALITY |= {"reuse_coefficient": 0.1, "reuse_half_life": 2.0, "cache_prior": 0.1, "cache_prior_experts": 4}


class Tokens:
    """Windows of random tokens, all in memory."""

    def __init__(self, number, seed=0):
        self.data = torch.randint(VOCAB, (number, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))
        self.seq_len = SEQ_LEN

    def __len__(self):
        return len(self.data)

    def batch(self, indices):
        return self.data[list(indices), :-1].clone(), self.data[list(indices), 1:].clone()


class Model(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(8, VOCAB)

    def forward(self, tokens):
        return self.output(self.dropout(self.norm(self.embedding(tokens))))


class Objective:
    """Plain NLL, with a hook that the tests use to interrupt."""

    def __init__(self, before_step=lambda step: None):
        self.before_step = before_step

    def loss(self, model, batch, step):
        self.before_step(step)
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())
        return loss, {"loss": loss, "squared": loss**2}

    def validation_sums(self, model, batch, step):
        nll = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="sum")
        return {"nll": nll.double(), "count": torch.tensor(batch.targets.numel())}

    def validation_metrics(self, sums):
        return {"loss": float(sums["nll"] / sums["count"])}


class InterruptedInAValidation(Objective):
    """By a signal at step 7."""

    def validation_sums(self, model, batch, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validation_sums(model, batch, step)


def make_settings(**changes):
    settings = {
        "batch_size": 4, "micro_batch_size": 4, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 3,
        "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 0.5, "validate_every": "epoch",
        "checkpoint_every": 3,
    }  # fmt: skip
    return Training(**{**settings, **changes})


def make_trainer(
    scratch, objective=None, dropout=0.2, training=None, epochs=3, also_validate_on=None, early_stopping_patience=None,
    keep_best=True, **changes,
):  # fmt: skip
    return Trainer(
        Model(dropout), objective or Objective(), training or Tokens(30), Tokens(7, seed=1), make_settings(**changes),
        total_steps=7 * epochs, accelerator=make_accelerator("cpu", "fp32"), seed=5, scratch=scratch,
        also_validate_on=also_validate_on, early_stopping_patience=early_stopping_patience, keep_best=keep_best,
    )  # fmt: skip


def make_dwr_trainer(scratch, balance="auxiliary", coefficient=0.01, **knobs):
    """A trainer of DWR with micro-batches of 6 tokens, which cannot fill all of its 16 experts."""
    config = DWRConfig(
        d_model=16, d_ff=16, num_layers=2, num_heads=2, num_experts=16, top_k=2, max_seq_len=SEQ_LEN, dropout=0.0,
        capacity_factor=None, vocab_size=VOCAB, balance=balance,
    )  # fmt: skip
    torch.manual_seed(0)
    model, objective = DWRTransformer(config), DWRObjective(config, coefficient, **knobs)
    accelerator = make_accelerator("cpu", "fp32")
    return Trainer(
        model, objective, Tokens(30), Tokens(7, seed=1), make_settings(micro_batch_size=1), total_steps=14,
        accelerator=accelerator, seed=5, scratch=scratch,
        after_step=lambda steps: objective.end_step(model, steps, accelerator.reduce),
    )  # fmt: skip


def train(scratch, *args, **changes):
    with make_trainer(scratch, *args, **changes) as trainer:
        trainer.run()
        return trainer


def assert_same_checkpoint(one, other):
    (tensors, state), (other_tensors, other_state) = load_checkpoint(one), load_checkpoint(other)
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
