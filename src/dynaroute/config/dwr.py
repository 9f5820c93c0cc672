"""Settings of DWR: the model, the runs beside it, the store of experts, and caches."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dynaroute.config.schema import (
    Distinct,
    Fraction,
    LossWeight,
    Moderate,
    Name,
    NonNegativeFloat,
    Positive,
    Section,
    Seed,
    Size,
    invalid,
)
from dynaroute.config.training import EpochTraining


class DWRArchitecture(Section):
    """The sizes of a DWR model, except its vocabulary, which comes from the tokens."""

    d_model: Size
    d_ff: Size  # hidden width of one expert
    num_layers: Size
    num_heads: Size
    num_experts: Size  # per layer
    top_k: Size  # experts per token
    max_seq_len: Size  # learned positions, and the training window
    dropout: Fraction
    capacity_factor: Moderate | None  # in training, an expert takes at most factor * fair share; null: all

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_model % self.num_heads:
            raise invalid("d_model", self.d_model, f"must be divisible by num_heads = {self.num_heads}")
        if self.num_experts == 1:
            raise invalid("num_experts", 1, "must be at least 2: with one expert, a router has nothing to choose")
        if self.top_k > self.num_experts:
            raise invalid("top_k", self.top_k, f"must be at most num_experts = {self.num_experts}")
        for key in ("d_model", "d_ff"):
            if getattr(self, key) % 16:
                allowed = "must be a multiple of 16, so that every exported tensor starts 64-byte aligned"
                raise invalid(key, getattr(self, key), allowed)
        return self


# How training balances the load of experts: a loss of each micro-batch, or of `balance_window` steps; or a bias.
Balance = Literal["auxiliary", "auxiliary_accumulated", "loss_free"]


class DWR(DWRArchitecture):
    """The DWR model and its training."""

    corpus: str
    # The loss is also recorded on the whole training split of these corpora, which are not trained on.
    also_validate_on: Annotated[list[str], Distinct]
    balance: Balance
    balance_coefficient: LossWeight  # of the loss
    balance_window: Positive  # steps over which loads are counted, unless they are those of a micro-batch
    balance_rate: LossWeight  # of loss_free: what a window adds to the bias of an expert or takes from it, in logits
    reuse_coefficient: LossWeight  # of a loss for routing unlike what the same text used recently
    reuse_half_life: Moderate  # of a token in what is recent, in tokens
    cache_prior: LossWeight  # largest bonus to scores of experts that a simulated cache holds, in logits; 0: no cache
    cache_prior_experts: Size  # of a layer that the simulated cache holds
    training: EpochTraining

    @model_validator(mode="after")
    def _simulated_cache_fits(self) -> Self:
        if self.cache_prior and not self.top_k <= self.cache_prior_experts <= self.num_experts:
            allowed = f"must be top_k = {self.top_k} to num_experts = {self.num_experts}"
            raise invalid("cache_prior_experts", self.cache_prior_experts, allowed)
        return self

    @model_validator(mode="after")
    def _balance_is_of_one_kind(self) -> Self:
        if self.balance == "loss_free" and self.balance_coefficient:
            allowed = "must be 0.0 with balance = loss_free, which has no loss"
            raise invalid("balance_coefficient", self.balance_coefficient, allowed)
        return self


class DWRRun(DWR):
    """A DWR model that is trained and scored on part of the text, for comparison with others like it."""

    train_windows: Positive | None  # evenly spaced over the training split; null: all
    validation_windows: Positive | None  # likewise; also of the training text, for its loss
    eval_windows: Positive | None  # of the test split
    seed: Seed  # of initialisation, data order and dropout

    @model_validator(mode="after")
    def _reads_one_corpus(self) -> Self:
        if self.also_validate_on:
            allowed = "must be empty: a run says nothing of other corpora, and its stage depends on its own alone"
            raise invalid("also_validate_on", self.also_validate_on, allowed)
        return self


Precision = Literal["fp32", "bf16", "int8"]  # of stored experts
PolicyName = Literal["lru", "lfu", "weighted_lru", "pinned", "next_use", "least_stale", "lfru", "token_path"]
PrefetchName = Literal["none", "frequency", "transition", "gate"]


class ExportExperts(Section):
    """How experts are stored, and measured when they are exported."""

    precision: Precision  # of the experts' weights on disk; only fp32 is exact
    calibration_windows: Positive  # of the validation split: for transitions, and the loss due to lower precisions


class TraceRouting(Section):
    """The recording of routing."""

    windows: Positive  # of the test split


Capacities = Annotated[list[Positive], Field(min_length=1), Distinct]  # experts
Policies = Annotated[list[PolicyName], Field(min_length=1), Distinct]
Prefetchers = Annotated[list[PrefetchName], Field(min_length=1), Distinct]


class BenchmarkCache(Section):
    """Decoding with caches: every capacity with every policy and prefetcher."""

    capacities: Capacities
    policies: Policies
    prefetchers: Prefetchers
    lookahead: Positive  # experts that a prefetcher predicts, also in the replay of the trace
    num_prompts: Positive
    prompt_tokens: Positive
    new_tokens: Positive
    repeats: Positive  # timed repetitions of every cell, interleaved


class SimulatedMachine(Section):
    """A machine that reads experts and computes with them; decoding is bound by bytes."""

    read_gb_per_second: Moderate
    read_latency_us: NonNegativeFloat  # of each expert
    compute_gb_per_second: Moderate  # at which weights in memory are read


class SimulatedModel(Section):
    """The sizes of a model that routes as in the trace."""

    expert_mib: Moderate
    dense_mib: Moderate  # of a layer besides its experts, and its part of embedding and output


class SimulateCache(Section):
    """The replay of the trace."""

    capacities: Capacities
    policies: Policies
    prefetchers: Prefetchers
    machines: Annotated[dict[Name, SimulatedMachine], Field(min_length=1)]
    models: Annotated[dict[Name, SimulatedModel], Field(min_length=1)]
