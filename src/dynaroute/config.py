"""params.yaml -> validated, typed, immutable settings.

Every stage loads the whole file, so that a mistake anywhere stops the pipeline before expensive work. The classes
hold no defaults: params.yaml is the only place that holds values, and a test pins its keys to these classes.
"""

import difflib
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML, YAMLError

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.scratch import hint_of_copy

MAX_SEED = 2**63 - 1
MAX_THREADS = 1024
TEMPERATURES = (1e-6, 1e6)  # float32 holds these, their inverses, and products with logits and gradients

Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
TwoOrMore = Annotated[int, Field(ge=2, lt=2**31)]  # for what needs a spread
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # becomes a folder's name
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]
Moderate = Annotated[float, Field(ge=1e-6, le=1e6)]  # for what is divided by
LossWeight = Annotated[float, Field(ge=0, le=1e6)]


def _without_repeats(entries: list[Any]) -> list[Any]:
    if any(entry in entries[:place] for place, entry in enumerate(entries)):
        raise PydanticCustomError("repeated", "must not hold an entry twice")
    return entries


Distinct = AfterValidator(_without_repeats)  # of lists whose duplicates would be counted twice


def invalid(key: str, value: object, allowed: str) -> PydanticCustomError:
    """The error for a value that conflicts with another one."""
    key, allowed = (text.encode(errors="backslashreplace").decode() for text in (key, allowed))  # pydantic wants UTF-8
    return PydanticCustomError("invalid", "{allowed}", {"key": key, "shown": _shown(value), "allowed": allowed})


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


class Section(BaseModel):
    """Base of all settings: typed strictly, immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping_of_known_keys(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise PydanticCustomError("not_a_mapping", "must be a mapping with the keys " + ", ".join(cls.model_fields))
        for key in data:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                raise invalid(str(key), data[key], f"unknown key; {hint}")
        return data


def chosen_by_kind(union: Any) -> Any:
    """The section of a union that its key `kind` names."""
    kinds = [get_args(section.model_fields["kind"].annotation)[0] for section in get_args(union)]

    def check(data: Any) -> Any:
        if isinstance(data, get_args(union)):
            return data
        if not isinstance(data, dict):
            raise PydanticCustomError("not_a_mapping", "must be a mapping with a kind: " + ", ".join(kinds))
        if data.get("kind") not in kinds:
            raise invalid("kind", data.get("kind"), f"must be one of {', '.join(kinds)}")
        return data

    return Annotated[union, Field(discriminator="kind"), BeforeValidator(check)]


class Hosted(Section):
    """What the hub has under an id, or a local directory holds."""

    path: Annotated[str, Field(min_length=1)]
    revision: str | None  # a commit hash, so that nothing can change under a finished run; null for a local directory

    @model_validator(mode="after")
    def _a_local_directory_has_no_revisions(self) -> Self:
        if self.revision is not None and Path(self.path).is_dir():
            raise invalid("revision", self.revision, f"must be null, since path = {self.path!r} is a local directory")
        return self

    def refuse_unpinned(self, key: str) -> None:
        """Raises DynarouteError if this is no folder here and has no revision; `key` is what the line begins with."""
        if self.revision is not None or Path(self.path).is_dir():
            return
        if (hint := hint_of_copy(self.path)) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path):
            raise DynarouteError(f"{key}.path = {self.path!r}: no such folder (seen from {Path.cwd()}){hint}")
        kind = "datasets/" if isinstance(self, HostedData) else ""
        raise DynarouteError(
            f"{key}.revision = None: {self.path!r} is no folder here, and of the hub a commit must be named: "
            f"`git ls-remote https://huggingface.co/{kind}{self.path} HEAD` prints the newest"
        )


class HostedData(Hosted):
    """A dataset among what is hosted; the rest are models and their tokenizers."""


# --- corpora -----------------------------------------------------------------------------------------------------


class Domain(Section):
    """Files of installed packages with text of one kind."""

    read: Literal["text", "docstrings"]  # files whole, or the docstrings of Python files without their examples
    paths: Annotated[list[str], Field(min_length=1), Distinct]  # patterns that start with a package: numpy/**/*.csv


class InstalledText(Section):
    """Text of several kinds that installed packages bring: a corpus without a network. `source` is the domain."""

    kind: Literal["installed_text"]
    characters: Positive  # of each domain, or all there are
    domains: Annotated[dict[str, Domain], Field(min_length=1)]

    @property
    def packages(self) -> list[str]:
        """The importable names of the packages that it is read from, sorted."""
        return sorted({path.partition("/")[0] for domain in self.domains.values() for path in domain.paths})


class Hub(HostedData):
    """A text dataset that `datasets.load_dataset` finds: a hub id or a local directory."""

    kind: Literal["hub"]
    name: str | None  # the dataset's configuration
    text_column: str
    rows: Literal["documents", "joined"]  # joined: all rows of a split, two newlines between, are one document


class Dolma(Section):
    """JSON lines in Dolma's format, {id, text, source, ...}, compressed by gzip or zstd, found by local glob patterns.

    Of documents with the same id and source the first is kept, and the number of the others reported. Blank lines are
    skipped. A damaged line, or one whose text is null, stops the stage: it is named, never left out.
    """

    kind: Literal["dolma"]
    paths: Annotated[list[str], Field(min_length=1), Distinct]


class DolmaStream(HostedData):
    """Files in Dolma's format at the addresses that Dolma publishes: downloaded, tokenized and not kept.

    The list of addresses is a file of the dataset: Dolma's are `urls/<version>.txt`.
    """

    kind: Literal["dolma_stream"]
    addresses: Annotated[str, Field(min_length=1)]  # the list, an address a line, from the dataset's root
    files: Positive | None  # how many of the list, from its start; null: all


class Files(Section):
    """Local UTF-8 text files found by glob patterns, a document each; `source` is the name of its folder.

    A document's id, by which it is split, is its path from the working directory; or, where an absolute pattern found
    it, from the last folder before the first wildcard, so that it does not matter where that folder lies.
    """

    kind: Literal["files"]
    paths: Annotated[list[str], Field(min_length=1), Distinct]


Source = chosen_by_kind(InstalledText | Hub | Dolma | DolmaStream | Files)


class Split(Section):
    """Shares of the documents held out, drawn by a hash of the document's id; the rest is for training."""

    validation: Fraction
    test: Fraction

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1:
            raise invalid("test", self.test, f"validation + test must be below 1; validation is {self.validation}")
        return self


class Region(Section):
    """Documents held out by their place in the corpus: `skip` for training, then these, then the rest for training.

    They are the same ones however many documents follow, so that a longer corpus never trains on what
    a shorter one held out.
    """

    skip: NonNegative  # documents before the region
    validation: NonNegative  # documents
    test: NonNegative  # documents, after those for validation


# official: the train, validation and test splits of a hub dataset. Told apart by type and key, so that a mistake in
# the shares is reported as such.
def _official_or_a_mapping(data: Any) -> Any:
    if data != "official" and not isinstance(data, dict | Split | Region):
        raise PydanticCustomError("not_a_split", "must be official, or a mapping with the keys validation, test")
    return data


def _kind_of_split(value: Any) -> str:
    if isinstance(value, str):
        return "official"
    return "region" if isinstance(value, Region) or (isinstance(value, dict) and "skip" in value) else "shares"


HeldOut = Annotated[
    Annotated[Literal["official"], Tag("official")]
    | Annotated[Split, Tag("shares")]
    | Annotated[Region, Tag("region")],
    Discriminator(_kind_of_split),
    BeforeValidator(_official_or_a_mapping),
]


class ByteBPE(Section):
    """A byte-level BPE trained on the corpus's own training split."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=257, lt=2**31)]  # 256 bytes and the end-of-text token


class GPT2(Section):
    """GPT-2's BPE by tiktoken: 50,257 tokens."""

    kind: Literal["gpt2"]


class HubTokenizer(Hosted):
    """The fast tokenizer of a hub id or a local directory.

    One that splits text first, as GPT-2's, Llama 3's, OLMo 2's or Qwen's do, reads documents of any length in pieces.
    Any other, such as Llama 2's, reads them whole, up to four million characters.
    """

    kind: Literal["hub"]


Tokenizer = chosen_by_kind(ByteBPE | GPT2 | HubTokenizer)


class Corpus(Section):
    """One named corpus: where it comes from, how it is split, how it is tokenized."""

    source: Source
    split: HeldOut
    tokenizer: Tokenizer

    @model_validator(mode="after")
    def _official_splits_need_a_hub(self) -> Self:
        if self.split == "official" and self.source.kind != "hub":
            raise invalid("split", self.split, f"{self.source.kind} has no official splits: give the shares held out")
        if self.source.kind == "dolma_stream" and self.tokenizer.kind == "bpe":
            allowed = "must be gpt2 or hub with dolma_stream: a BPE is trained on text at hand"
            raise invalid("tokenizer.kind", self.tokenizer.kind, allowed)
        return self


# --- training ----------------------------------------------------------------------------------------------------


class Training(Section):
    """What the one training loop needs to know, whatever it trains, but for how long."""

    batch_size: Positive  # sequences per optimizer step, over all processes
    micro_batch_size: Positive  # sequences per forward pass of one process; the rest is gradient accumulation
    lr: PositiveFloat
    min_lr: NonNegativeFloat  # where the cosine ends
    warmup_steps: NonNegative
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    weight_decay: NonNegativeFloat  # on matrices only: no biases, norms or embeddings
    clip_norm: PositiveFloat
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

    epochs: PositiveFloat  # may be a part of one
    precision: Literal["fp32", "bf16"]  # bf16: autocast where the device has it, else fp32
    early_stopping_patience: Positive | None  # validations without improvement before stopping; null: never


# --- dynamic weight retrieval ------------------------------------------------------------------------------------


class DWRArchitecture(Section):
    """The sizes of a DWR model but for its vocabulary, which comes from the tokens."""

    d_model: Positive
    d_ff: Positive  # hidden width of one expert
    num_layers: Positive
    num_heads: Positive
    num_experts: Positive  # per layer
    top_k: Positive  # experts per token
    max_seq_len: Positive  # learned positions, and the training window
    dropout: Fraction
    capacity_factor: PositiveFloat | None  # in training, an expert takes at most factor * fair share; null: all

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_model % self.num_heads:
            raise invalid("d_model", self.d_model, f"must be divisible by num_heads = {self.num_heads}")
        if self.top_k > self.num_experts:
            raise invalid("top_k", self.top_k, f"must be at most num_experts = {self.num_experts}")
        for key in ("d_model", "d_ff"):
            if getattr(self, key) % 16:
                allowed = "must be a multiple of 16, so that every exported tensor starts 64-byte aligned"
                raise invalid(key, getattr(self, key), allowed)
        return self


class DWR(DWRArchitecture):
    """The DWR model and its training."""

    corpus: str
    # Corpora on all of whose training split the loss is recorded too; they are not trained on.
    also_validate_on: Annotated[list[str], Distinct]
    balance_coefficient: LossWeight
    training: EpochTraining


class DWRRun(DWR):
    """A DWR model that is trained for comparison with others like it: on some of the text, scored on some of it."""

    train_windows: Positive | None  # evenly spaced over the training split; null: all
    validation_windows: Positive | None  # likewise; also of the training text, for its loss
    eval_windows: Positive | None  # of the test split

    @model_validator(mode="after")
    def _reads_one_corpus(self) -> Self:
        if self.also_validate_on:
            allowed = "must be empty: a run says nothing of other corpora, and its stage depends on its own alone"
            raise invalid("also_validate_on", self.also_validate_on, allowed)
        return self


Precision = Literal["fp32", "bf16", "int8"]  # of stored experts
PolicyName = Literal["lru", "lfu", "weighted_lru", "pinned", "next_use"]
PrefetchName = Literal["none", "frequency", "transition", "gate"]


class ExportExperts(Section):
    """How experts are stored, and what is found out about them meanwhile."""

    precision: Precision  # of the experts' weights on disk; only fp32 is exact
    calibration_windows: Positive  # of the validation split: for transitions, and the loss that precisions cost


class TraceRouting(Section):
    """The recording of routing."""

    windows: Positive  # of the test split


Capacities = Annotated[list[Positive], Field(min_length=1), Distinct]  # experts


class BenchmarkCache(Section):
    """Decoding with caches: every capacity with every policy and prefetcher."""

    capacities: Capacities
    policies: Annotated[list[PolicyName], Field(min_length=1), Distinct]
    prefetchers: Annotated[list[PrefetchName], Field(min_length=1), Distinct]
    lookahead: Positive  # experts that a prefetcher predicts
    num_prompts: Positive
    prompt_tokens: Positive
    new_tokens: Positive
    repeats: Positive  # timed repetitions of every cell, interleaved


class SimulatedMachine(Section):
    """Where experts come from, and what computes with them; decoding is bound by bytes."""

    read_gb_per_second: Moderate
    read_latency_us: NonNegativeFloat  # of each expert
    compute_gb_per_second: Moderate  # at which weights in memory are read


class SimulatedModel(Section):
    """The sizes of a model whose routing is that of the trace."""

    expert_mib: Moderate
    dense_mib: Moderate  # of a layer besides its experts, and its part of embedding and output


class SimulateCache(Section):
    """The replay of the trace."""

    capacities: Capacities
    machines: Annotated[dict[Name, SimulatedMachine], Field(min_length=1)]
    models: Annotated[dict[Name, SimulatedModel], Field(min_length=1)]


# --- DAGFormer ---------------------------------------------------------------------------------------------------


class PretrainedBase(Section):
    """A small OLMo-2 pretrained here on the training split, with the corpus's tokenizer."""

    kind: Literal["pretrain"]
    hidden_size: Positive
    intermediate_size: Positive
    num_layers: Annotated[int, Field(ge=3, lt=2**31)]  # with fewer, no connection skips a layer
    num_heads: Positive
    training: EpochTraining

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            allowed = f"must be a multiple of 2 * num_heads = {2 * self.num_heads}, for rotary positions"
            raise invalid("hidden_size", self.hidden_size, allowed)
        return self


class LoadedBase(Hosted):
    """An OLMo-2 from the hub or from a local directory; the corpus must be tokenized with its tokenizer."""

    kind: Literal["load"]


class BaseEncoder(Section):
    """The frozen base's own last hidden states, averaged over the tokens read."""

    kind: Literal["base"]


class HubEncoder(Hosted):
    """A text encoder from the hub or a local directory: its tokenizer reads the text, averaged over its tokens."""

    kind: Literal["hub"]


class DAGFormer(Section):
    """What all DAGFormer variants share: the base, the text, and what is evaluated."""

    corpus: str
    seq_len: TwoOrMore  # tokens of a window
    train_windows: Positive | None  # evenly spaced over the training split; null: all
    validation_windows: TwoOrMore  # scored during training; an interval needs two
    eval_windows: TwoOrMore  # of the test split, scored once
    prefix_tokens: Positive  # what the encoder reads of a window in the prefix protocol; NLL counts the rest
    precision: Literal["fp32", "bf16"]  # of base and encoder, weights and work; bf16 where the device has it, else fp32
    base: chosen_by_kind(PretrainedBase | LoadedBase)
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

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]  # of initialisation, data order and noise
    steps: Positive
    predictor_input: Literal["text", "none"]  # none: one learned topology for all texts, as a control
    predictor_hidden: Positive
    rank: Positive  # of U V^T
    init_logit: Annotated[float, Field(ge=-1e6, le=1e6)]
    tau_init: Temperature
    tau_final: Temperature
    lambda_init: LossWeight  # weight of mean_A in the loss
    lambda_final: LossWeight  # reached over the first fifth of the steps
    cascade: Literal["off", "fixed", "learnable"]
    cascade_k: PositiveFloat
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
        """In words, by knob, what trained weights decide: which tensors there are, and what only initialises some."""
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
    right: Annotated[list[Name], Field(min_length=1), Distinct]  # variants, or baseline alone
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
    oracle_windows: TwoOrMore  # whose gates are optimised directly
    oracle_steps: Positive
    oracle_lr: PositiveFloat


# --- the whole file ----------------------------------------------------------------------------------------------


BASELINE = "baseline"  # beside the variants: the shared base with every gate at one
MODES = ("soft", "hard")  # of gates
PROTOCOLS = ("window", "prefix")  # of evaluation: what the encoder reads, and with it what is scored
RESERVED = ("base", "hub", BASELINE)


class Settings(Variant):
    """All of params.yaml. The knobs of DAGFormer's P1 are its top-level keys; `variants` override some of them."""

    launcher: str
    device: Literal["cpu", "cuda"]
    num_threads: Annotated[int, Field(gt=0, le=MAX_THREADS)]
    corpora: dict[Name, Corpus]
    dwr: DWR
    # Overrides: of the reference on `dwr` but for its also_validate_on, of every other run on the reference.
    dwr_runs: dict[Name, dict[str, Any]]
    export_experts: ExportExperts
    trace_routing: TraceRouting
    benchmark_cache: BenchmarkCache
    simulate_cache: SimulateCache
    dagformer: DAGFormer
    variants: dict[Name, dict[str, Any]]  # `from`: what it starts from, base or another variant; the rest: overrides
    analysis: Analysis

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        try:
            words = shlex.split(self.launcher)
        except ValueError:  # a quotation that does not end
            words = []
        if not words:
            raise invalid("launcher", self.launcher, "must be a command, such as python")
        used = [("dwr.corpus", self.dwr.corpus), ("dagformer.corpus", self.dagformer.corpus)]
        for key, name in [*used, *(("dwr.also_validate_on", name) for name in self.dwr.also_validate_on)]:
            if name not in self.corpora:
                raise invalid(key, name, f"must be one of corpora: {', '.join(self.corpora)}")
        if self.dwr.corpus in self.dwr.also_validate_on:
            raise invalid("dwr.also_validate_on", self.dwr.corpus, "must not name dwr.corpus, which is trained on")
        window = self.benchmark_cache.prompt_tokens + self.benchmark_cache.new_tokens
        if window > self.dwr.max_seq_len:
            allowed = f"with prompt_tokens must be at most dwr.max_seq_len = {self.dwr.max_seq_len}"
            raise invalid("benchmark_cache.new_tokens", self.benchmark_cache.new_tokens, allowed)
        experts = self.dwr.num_layers * self.dwr.num_experts
        for name in ("benchmark_cache", "simulate_cache"):
            capacities = getattr(self, name).capacities
            if max(capacities) > experts:
                raise invalid(f"{name}.capacities", capacities, f"must be at most num_layers * num_experts = {experts}")
        if self.benchmark_cache.lookahead > self.dwr.num_experts:
            allowed = f"must be at most dwr.num_experts = {self.dwr.num_experts}"
            raise invalid("benchmark_cache.lookahead", self.benchmark_cache.lookahead, allowed)
        self._check_dwr_runs()
        for name in self.variants:
            self._check_variant(name)
        for name in self.analysis.variants:
            if name not in self.variants:
                raise invalid("analysis.variants", name, f"must be among variants: {', '.join(self.variants)}")
        for key, question in self.analysis.primary.items():
            for side in ("left", "right"):
                names = getattr(question, side)
                for name in names:
                    if name not in self.variants and not (side == "right" and names == [BASELINE]):
                        allowed = f"must be among variants: {', '.join(self.variants)}"
                        raise invalid(f"analysis.primary.{key}.{side}", name, allowed)
        if self.analysis.swaps >= (texts := self.dagformer.eval_windows):
            allowed = f"must be below dagformer.eval_windows = {texts}: a text has no more others"
            raise invalid("analysis.swaps", self.analysis.swaps, allowed)
        return self

    def _check_dwr_runs(self) -> None:
        if "reference" not in self.dwr_runs:
            raise invalid("dwr_runs", list(self.dwr_runs), "must have a reference, which the others override")
        for name in sorted(self.dwr_runs, key=lambda name: name != "reference"):  # whose mistakes are those of all
            # Also where it is the reference's: a run's stage depends on the tokens of the corpus that it names.
            if (corpus := self.dwr_runs[name].get("corpus")) not in list(self.corpora):
                allowed = f"must be one of corpora: {', '.join(self.corpora)}"
                raise invalid(f"dwr_runs.{name}.corpus", corpus, allowed)
            try:
                self.dwr_run(name)
            except ValidationError as error:
                problem = _one_line(error, self._dwr_run_knobs(name))
                raise DynarouteError(f"dwr_runs.{name}.{problem}") from error

    def _check_variant(self, name: str) -> None:
        if name in RESERVED:
            raise invalid(f"variants.{name}", self.variants[name], "this name stands for the base that variants wire")
        start, seen = name, []
        while start != "base":  # follows `from` to the base
            seen.append(start)
            start = self.variants[start].get("from")
            if start not in ["base", *self.variants] or start in seen:
                known = ", ".join(["base", *(other for other in self.variants if other not in seen)])
                raise invalid(f"variants.{seen[-1]}.from", start, f"must be one of {known}")
        try:
            self.variant(name)
        except ValidationError as error:
            problem = _one_line(error, dict.fromkeys([*Variant.model_fields, *self.variants[name]]))
            raise DynarouteError(f"variants.{name}.{problem}") from error
        if (start := self.variants[name]["from"]) != "base":
            own, theirs = self.variant(name), self.variant(start)
            given = own.given_by_weights()
            for key, expected in theirs.given_by_weights().items():
                if given[key] != expected:
                    allowed = f"must be {expected}, as in {start}, whose weights it goes on from"
                    raise invalid(f"variants.{name}.{key}", getattr(own, key), allowed)

    def variant(self, name: str) -> Variant:
        """All knobs of a variant: those at the top level, or of the variant that it continues, with its overrides.

        What continues another variant does so at that one's final tau and lambda.

        Raises:
            DynarouteError: there is no variant of that name.
        """
        if name not in self.variants:
            raise DynarouteError(f"variants.{name}: no such variant; known: {', '.join(self.variants)}")
        overrides = dict(self.variants[name])
        start = overrides.pop("from")
        if start == "base":
            knobs = self.model_dump(include=set(Variant.model_fields))
        else:
            knobs = self.variant(start).model_dump()
            knobs |= {"tau_init": knobs["tau_final"], "lambda_init": knobs["lambda_final"]}
        return Variant.model_validate(knobs | overrides)

    def dwr_run(self, name: str) -> DWRRun:
        """All knobs of a DWR run: those of `dwr`, with the overrides of the reference and then its own.

        Raises:
            DynarouteError: there is no run of that name.
        """
        if name not in self.dwr_runs:
            raise DynarouteError(f"dwr_runs.{name}: no such run; known: {', '.join(self.dwr_runs)}")
        return DWRRun.model_validate(self._dwr_run_knobs(name))

    def _dwr_run_knobs(self, name: str) -> dict[str, Any]:
        knobs = self.dwr.model_dump() | {"also_validate_on": []}
        return _overridden(_overridden(knobs, self.dwr_runs["reference"]), self.dwr_runs[name])

    def corpus(self, name: str) -> Corpus:
        """The corpus of that name.

        Raises:
            DynarouteError: there is none.
        """
        if name not in self.corpora:
            raise DynarouteError(f"corpora.{name}: no such corpus; known: {', '.join(self.corpora)}")
        return self.corpora[name]


def _overridden(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Values with overrides; of a mapping in both, key by key."""
    nested = {
        key: _overridden(values[key], own)
        for key, own in overrides.items()
        if isinstance(own, dict) and isinstance(values.get(key), dict)
    }
    return values | overrides | nested


def read_yaml(path: str | Path) -> Any:
    """YAML 1.2, in which the `1e-05` that DVC writes is a float (PyYAML reads YAML 1.1, and a string).

    Raises:
        DynarouteError: the file is missing or is not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DynarouteError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (YAMLError, ValueError, IndexError, RecursionError) as error:  # not only YAMLError: of numbers and dates
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        raise DynarouteError(f"{path}{line}: not valid YAML: {problem}") from error


def load_settings(path: str | Path = "params.yaml") -> Settings:
    """Reads and validates all settings.

    Raises:
        DynarouteError: with one line that names the key, its value and what is allowed.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise DynarouteError(f"{path}: must be a mapping of settings, not {type(data).__name__}")
    try:
        return Settings.model_validate(data)
    except DynarouteError as error:  # of overrides
        raise DynarouteError(f"{path}: {error}") from error
    except ValidationError as error:
        raise DynarouteError(f"{path}: {_one_line(error, data)}") from error


def _one_line(error: ValidationError, data: Any) -> str:
    """The first problem as "key = value: what is allowed", and how many other keys have one."""
    problems: dict[str, list[str]] = {}  # what is allowed, by key and value: a union has an answer for each member
    for problem in error.errors():
        keys, value, allowed = _key_of(problem, data), _shown(problem["input"]), problem["msg"]
        allowed = allowed[0].lower() + allowed[1:]
        if problem["type"] == "invalid":
            keys, value = [*keys, problem["ctx"]["key"]], problem["ctx"]["shown"]
        elif problem["type"] == "dict_type":
            allowed = "must be a mapping"
        elif problem["type"] == "too_short":
            allowed = f"must have at least {problem['ctx']['min_length']}"
        name = ".".join(keys)
        subject = f"{name} is missing" if problem["type"] == "missing" else f"{name} = {value}"
        problems.setdefault(subject, []).append(allowed)
    subject, allowed = next(iter(problems.items()))
    line = subject if subject.endswith(" is missing") else f"{subject}: {' or '.join(allowed)}"
    return line + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _key_of(problem: Any, data: Any) -> list[str]:
    """The path of keys in the file: a problem's location also holds the tags of unions, which are not keys."""
    keys, at = [], data
    for part in problem["loc"]:
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int)):
            keys.append(str(part))
            at = at[part]
    return [*keys, str(problem["loc"][-1])] if problem["type"] == "missing" else keys
