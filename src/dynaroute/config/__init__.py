"""params.yaml -> validated, typed, immutable settings.

Every stage loads the whole file, so that a mistake anywhere stops the pipeline before expensive work. The classes
hold no defaults: params.yaml is the only place that holds values, and a test pins its keys to these classes.
"""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dynaroute.config.dagformer import BASELINE, Analysis, DAGFormer, Variant
from dynaroute.config.data import Corpus
from dynaroute.config.dwr import DWR, BenchmarkCache, DWRRun, ExportExperts, SimulateCache, TraceRouting
from dynaroute.config.schema import MAX_THREADS, Name, invalid, one_line, read_yaml
from dynaroute.errors import DynarouteError


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
                problem = one_line(error, self._dwr_run_knobs(name))
                raise DynarouteError(f"dwr_runs.{name}.{problem}") from error

    def _check_variant(self, name: str) -> None:
        if name in ("base", "hub", BASELINE):
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
            problem = one_line(error, dict.fromkeys([*Variant.model_fields, *self.variants[name]]))
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
        raise DynarouteError(f"{path}: {one_line(error, data)}") from error
