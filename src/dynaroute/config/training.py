"""Settings of the training loop, which both systems share."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dynaroute.config.schema import (
    Fraction,
    Moderate,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Size,
    invalid,
)


class Training(Section):
    """Settings of the training loop, except for how long it trains."""

    batch_size: Size  # sequences per optimizer step, over all processes
    micro_batch_size: Size  # sequences per forward pass of one process; the rest is gradient accumulation
    lr: PositiveFloat
    min_lr: NonNegativeFloat  # where the cosine ends
    warmup_steps: NonNegative
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    weight_decay: NonNegativeFloat  # on matrices only: no biases, norms or embeddings
    clip_norm: Moderate
    validate_every: Literal["epoch"] | Positive  # steps
    checkpoint_every: Positive  # steps between checkpoints; one is also written at every validation

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            allowed = f"must divide batch_size = {self.batch_size}"
            raise invalid("micro_batch_size", self.micro_batch_size, allowed)
        if self.min_lr > self.lr:
            raise invalid("min_lr", self.min_lr, f"must be at most lr = {self.lr}")
        return self


class EpochTraining(Training):
    """Training for a number of passes over the training windows."""

    epochs: Moderate  # may be a part of one
    precision: Literal["fp32", "bf16"]  # bf16: autocast where the device has it, else fp32
    early_stopping_patience: Positive | None  # validations without improvement before stopping; null: never
