"""Settings of DAGFormer: the base, the encoder, variants, and the analyses of their wirings."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dynaroute.config.data import Hosted
from dynaroute.config.schema import (
    Distinct,
    Fraction,
    LossWeight,
    Moderate,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    Size,
    TwoOrMore,
    chosen_by_kind,
    invalid,
)
from dynaroute.config.training import EpochTraining, Training

BASES = ("base", "planted")  # what variants start from
BASELINE = "baseline"  # beside the variants: the shared base with every gate at one
CONTROLS = (BASELINE, "random")  # scored with every variant, on its own windows
MODES = ("soft", "hard")  # of gates
PROTOCOLS = ("window", "prefix")  # of evaluation: what the encoder reads, and with it what is scored


class NewBase(Section):
    """A small OLMo-2 with random weights, to be trained here on the training split, with the corpus's tokenizer."""

    hidden_size: Size
    intermediate_size: Size
    num_layers: Annotated[int, Field(ge=3, le=2**20)]  # with fewer, no connection skips a layer
    num_heads: Size
    # Outputs of a layer have the RMS of its post-norm weights, and would drown an embedding of OLMo-2's own 0.02.
    embedding_std: Moderate  # initially
    post_norm_weight: Moderate  # initially, of both post-norms of every layer
    training: EpochTraining

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            allowed = f"must be a multiple of 2 * num_heads = {2 * self.num_heads}, for rotary positions"
            raise invalid("hidden_size", self.hidden_size, allowed)
        return self


class PretrainedBase(NewBase):
    """One pretrained as any language model."""

    kind: Literal["pretrain"]


class PlantedBase(NewBase):
    """One pretrained so that the text of each source needs a wiring of its own: see `dagformer.planted`."""

    open_share: Annotated[float, Field(gt=0, lt=1)]  # of the edges in each source's mask
    contrast: Fraction  # weight of the NLL under a wrong wiring, which is subtracted
    contrast_from: NonNegative  # step
    margin: Moderate  # nats per token by which a wrong wiring need be worse, and no more


class LoadedBase(Hosted):
    """A model from the hub, a local directory or a GGUF file; the corpus must be tokenized with its tokenizer."""

    kind: Literal["load"]


class BaseEncoder(Section):
    """The frozen base's own last hidden states, averaged over the tokens read."""

    kind: Literal["base"]


class HubEncoder(Hosted):
    """A text encoder from the hub or a local directory: its tokenizer reads the text, averaged over its tokens."""

    kind: Literal["hub"]


class DAGFormer(Section):
    """Settings that all DAGFormer variants share: the base, the text, and the evaluation."""

    corpus: str
    seq_len: Annotated[int, Field(ge=2, le=2**20)]  # tokens of a window
    train_windows: Positive | None  # evenly spaced over the training split; null: all
    validation_windows: TwoOrMore  # scored during training; an interval needs two
    eval_windows: TwoOrMore  # of the test split, scored once
    prefix_tokens: Positive  # what the encoder reads of a window in the prefix protocol; NLL counts the rest
    precision: Literal["fp32", "bf16"]  # of base and encoder, weights and work; bf16 where the device has it, else fp32
    base: chosen_by_kind(PretrainedBase | LoadedBase)
    planted: PlantedBase | None  # a second base, whose best wirings are known
    encoder: chosen_by_kind(BaseEncoder | HubEncoder)

    @model_validator(mode="after")
    def _prefix_leaves_something_to_score(self) -> Self:
        if self.prefix_tokens >= self.seq_len:
            raise invalid("prefix_tokens", self.prefix_tokens, f"must be below seq_len = {self.seq_len}")
        return self


NO_KNOBS = {
    "precision": "a predictor is trained in fp32, and dagformer.precision is that of the base",
    "early_stopping_patience": "its tau and lambda must reach their final values, at which it is scored and continued",
}


class Variant(Training):
    """One DAGFormer variant: its predictor, its gates and its training. At the top level of params.yaml: P1."""

    seed: Seed  # of initialisation, data order and noise
    steps: Positive
    # none: one learned topology for all texts, as a control; edges: the same with a free logit for every edge.
    predictor_input: Literal["text", "none", "edges"]
    predictor_hidden: Size
    rank: Size  # of U V^T
    init_logit: Annotated[float, Field(ge=-1e6, le=1e6)]
    tau_init: Moderate
    tau_final: Moderate
    lambda_init: LossWeight  # weight of mean_A in the loss
    lambda_final: LossWeight  # reached over the first fifth of the steps
    loss: Literal["nll", "kl"]  # kl: from what the base predicts
    gates: Literal["logistic", "straight_through", "hard_concrete"]  # see `dagformer.gates.gumbel_sigmoid`
    target_density: Annotated[float, Field(gt=0, lt=1)] | None  # the share of gates that is open; null: not held
    flip_gradients: bool  # of the loss by the gates, of each window at random: a control whose gates can only drift
    cascade: Literal["off", "fixed", "learnable"]
    cascade_k: Moderate
    exempt_first_layer: bool  # false only to show what the cascade does to layer 0 without it
    input_norm: Literal["none", "gate_mean", "rms_post", "ln_post", "rms_pre"]
    base_lr: NonNegativeFloat  # of the base, trained jointly with the predictor; 0: it is frozen
    alarm_steps: Positive  # that gates may be collapsed or saturated before it is said

    @model_validator(mode="before")
    @classmethod
    def _has_no_such_knob(cls, data: Any) -> Any:
        for key, why in NO_KNOBS.items():
            if isinstance(data, dict) and key in data:
                raise invalid(key, data[key], f"is no knob of a variant: {why}")
        return data

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_steps > self.steps:
            raise invalid("warmup_steps", self.warmup_steps, f"must be at most steps = {self.steps}")
        return self

    def given_by_weights(self) -> dict[str, str]:
        """In words, by knob, what trained weights fix: which tensors there are, and how some were initialised."""
        learnable = self.cascade == "learnable"
        return {
            **{key: str(getattr(self, key)) for key in ("predictor_input", "predictor_hidden", "rank", "init_logit")},
            "cascade": "learnable" if learnable else "off or fixed",
            "cascade_k": str(self.cascade_k) if learnable else "any",
            "base_lr": "above 0" if self.base_lr > 0 else "0",
        }


class Question(Section):
    """A primary question: whether the left side has a lower NLL than the right, on the same held-out windows."""

    question: Annotated[str, Field(min_length=1)]
    left: Annotated[list[Name], Field(min_length=1), Distinct]  # variants; several are averaged window by window
    # Variants; or alone baseline, the base as it is, or random, wirings that close as many edges as the left ones.
    right: Annotated[list[Name], Field(min_length=1), Distinct]
    mode: Literal["soft", "hard"]
    protocol: Literal["window", "prefix"]


class Analysis(Section):
    """The comparison of variants, and the analyses of wirings, all on the test split."""

    primary: Annotated[dict[Name, Question], Field(min_length=1, max_length=6)]  # all that is tested
    variants: Annotated[list[str], Field(min_length=1), Distinct]  # whose wirings are analysed
    permutations: Annotated[int, Field(ge=99, lt=2**31)]  # of every permutation test
    swaps: Positive  # other texts under whose wirings each text is scored
    domain_windows: TwoOrMore  # of each source, if it has as many; one has no distance within its source
    gradient_windows: TwoOrMore  # whose gradients at A = 1 are taken
    removal_windows: TwoOrMore  # scored without some of their edges; of other documents than those
    # Of all edges.
    removal_fractions: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1), Distinct]
    random_removals: Positive  # random orders of removal
    group_removals: Positive  # layer pairs, and heads, to remove that promise most, and as many that promise least
    group_windows: TwoOrMore  # of removal_windows, scored without them
    oracle_windows: TwoOrMore  # whose gates are optimised directly
    oracle_steps: Positive
    oracle_lr: PositiveFloat

    @model_validator(mode="after")
    def _groups_are_scored_on_windows_of_removals(self) -> Self:
        if self.group_windows > self.removal_windows:
            allowed = f"must be at most removal_windows = {self.removal_windows}"
            raise invalid("analysis.group_windows", self.group_windows, allowed)
        return self
