"""Reads params.yaml as validated, typed, immutable settings.

Every stage loads the whole file, so a mistake anywhere stops the pipeline before expensive work. The classes have no
defaults: all values are in params.yaml, and a test pins its keys to these classes.
"""

import contextlib
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dynaroute.config.dagformer import BASES, CONTROLS, Analysis, DAGFormer, Variant
from dynaroute.config.data import Corpus
from dynaroute.config.dwr import DWR, BenchmarkCache, DWRRun, ExportExperts, SimulateCache, TraceRouting
from dynaroute.config.schema import MAX_THREADS, Name, Section, invalid, one_line, read_yaml
from dynaroute.errors import DynarouteError


def _a_command(line: str) -> str:
    with contextlib.suppress(ValueError):  # an unterminated quotation
        if shlex.split(line):
            return line
    raise PydanticCustomError("not_a_command", "must be a command, such as python")


class Settings(Variant):
    """All of params.yaml. The knobs of DAGFormer's P1 are its top-level keys; `variants` override some of them."""

    launcher: Annotated[str, AfterValidator(_a_command)]
    device: Literal["cpu", "cuda"]
    num_threads: Annotated[int, Field(gt=0, le=MAX_THREADS)]
    corpora: dict[Name, Corpus]
    dwr: DWR
    # The reference overrides `dwr` and `seed`; every other run overrides the reference.
    dwr_runs: dict[Name, dict[str, Any]]
    export_experts: ExportExperts
    trace_routing: TraceRouting
    benchmark_cache: BenchmarkCache
    simulate_cache: SimulateCache
    dagformer: DAGFormer
    variants: dict[Name, dict[str, Any]]  # `from`: a base or another variant; the rest are overrides
    analysis: Analysis

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        dwr, benchmark = self.dwr, self.benchmark_cache
        self._must_have("corpora", {"dwr.corpus": [dwr.corpus], "dagformer.corpus": [self.dagformer.corpus]})
        self._must_have("corpora", {"dwr.also_validate_on": dwr.also_validate_on})
        if dwr.corpus in dwr.also_validate_on:
            raise invalid("dwr.also_validate_on", dwr.corpus, "must not name dwr.corpus, which is trained on")
        if benchmark.prompt_tokens + benchmark.new_tokens > dwr.max_seq_len:
            allowed = f"with prompt_tokens must be at most dwr.max_seq_len = {dwr.max_seq_len}"
            raise invalid("benchmark_cache.new_tokens", benchmark.new_tokens, allowed)
        experts = dwr.num_layers * dwr.num_experts
        for name in ("benchmark_cache", "simulate_cache"):
            capacities = getattr(self, name).capacities
            if max(capacities) > experts:
                raise invalid(f"{name}.capacities", capacities, f"must be at most num_layers * num_experts = {experts}")
        if benchmark.lookahead > dwr.num_experts:
            allowed = f"must be at most dwr.num_experts = {dwr.num_experts}"
            raise invalid("benchmark_cache.lookahead", benchmark.lookahead, allowed)
        self._check_dwr_runs()
        for name in self.variants:
            self._check_variant(name)
        self._must_have("variants", {"analysis.variants": self.analysis.variants})
        for name in self.analysis.variants:
            if self.base_of(name) != "base":
                raise invalid("analysis.variants", name, "must start from base")
        for key, question in self.analysis.primary.items():
            right = [] if len(question.right) == 1 and question.right[0] in CONTROLS else question.right
            sides = {"left": question.left, "right": right}
            self._must_have("variants", {f"analysis.primary.{key}.{side}": names for side, names in sides.items()})
            if len({self.base_of(name) for name in (*question.left, *right)}) > 1:
                raise invalid(f"analysis.primary.{key}", [*question.left, *right], "must start from one base")
        if self.analysis.swaps >= (texts := self.dagformer.eval_windows):
            allowed = f"must be below dagformer.eval_windows = {texts}: a text has no more others"
            raise invalid("analysis.swaps", self.analysis.swaps, allowed)
        return self

    def _must_have(self, section: str, named: dict[str, list[Any]]) -> None:
        """Refuses names, given by key, that a section does not have."""
        known = list(getattr(self, section))
        for key, names in named.items():
            for name in names:
                if name not in known:
                    raise invalid(key, name, f"must be among {section}: {', '.join(known)}")

    def _check_dwr_runs(self) -> None:
        if "reference" not in self.dwr_runs:
            raise invalid("dwr_runs", list(self.dwr_runs), "must have a reference, which the others override")
        # The reference first: the other runs inherit its mistakes.
        for name in sorted(self.dwr_runs, key=lambda name: name != "reference"):
            # Every run must name its corpus, since its stage depends on that corpus's tokens.
            self._must_have("corpora", {f"dwr_runs.{name}.corpus": [self.dwr_runs[name].get("corpus")]})
            self._check_knobs("dwr_runs", name, DWRRun)

    def _check_variant(self, name: str) -> None:
        if name in (*BASES, *CONTROLS, "hub"):
            raise invalid(f"variants.{name}", self.variants[name], "this name stands for the base that variants wire")
        start, seen = name, []
        bases = [base for base in BASES if base == "base" or self.dagformer.planted]
        while start not in bases:  # follows `from` to the base
            seen.append(start)
            start = self.variants[start].get("from")
            if start not in [*bases, *self.variants] or start in seen:
                known = ", ".join([*bases, *(other for other in self.variants if other not in seen)])
                raise invalid(f"variants.{seen[-1]}.from", start, f"must be one of {known}")
        self._check_knobs("variants", name, Variant)
        if (start := self.variants[name]["from"]) not in BASES:
            own, theirs = self.variant(name), self.variant(start)
            given = own.given_by_weights()
            for key, expected in theirs.given_by_weights().items():
                if given[key] != expected:
                    allowed = f"must be {expected}, as in {start}, whose weights it resumes"
                    raise invalid(f"variants.{name}.{key}", getattr(own, key), allowed)

    def _check_knobs(self, section: str, name: str, kind: type[Section]) -> None:
        knobs = self._knobs(section, name)
        try:
            kind.model_validate(knobs)
        except ValidationError as error:
            raise DynarouteError(f"{section}.{name}.{one_line(error, knobs)}") from error

    def variant(self, name: str) -> Variant:
        """All knobs of a variant. Raises DynarouteError: there is no variant of that name."""
        return Variant.model_validate(self._knobs("variants", name))

    def base_of(self, name: str) -> str:
        """The base, `base` or `planted`, that a variant or the variants before it start from."""
        start = self.variants[name]["from"]
        return start if start in BASES else self.base_of(start)

    def dwr_run(self, name: str) -> DWRRun:
        """All knobs of a DWR run. Raises DynarouteError: there is no run of that name."""
        return DWRRun.model_validate(self._knobs("dwr_runs", name))

    def corpus(self, name: str) -> Corpus:
        """The corpus of that name. Raises DynarouteError: there is none."""
        return self._named("corpora", name)

    def _named(self, section: str, name: str) -> Any:
        entries = getattr(self, section)
        if name not in entries:
            raise DynarouteError(f"{section}.{name}: no such name; known: {', '.join(entries)}")
        return entries[name]

    def _knobs(self, section: str, name: str) -> dict[str, Any]:
        """The knobs of a variant or DWR run: those that it starts from, with its overrides.

        A variant starts from P1, or from the variant it resumes, at that one's final tau and lambda. A DWR run starts
        from the reference, and the reference from `dwr`.
        """
        overrides = dict(self._named(section, name))
        if section == "variants":
            start, knobs = overrides.pop("from"), self.model_dump(include=set(Variant.model_fields))
            if start not in BASES:
                knobs = self._knobs(section, start)
                knobs |= {"tau_init": knobs["tau_final"], "lambda_init": knobs["lambda_final"]}
        elif name == "reference":
            knobs = self.dwr.model_dump() | {"also_validate_on": [], "seed": self.seed}
        else:
            knobs = self._knobs(section, "reference")
        return _overridden(knobs, overrides)


def _overridden(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Values with overrides; mappings in both are merged key by key."""
    both = {key for key, own in overrides.items() if isinstance(own, dict) and isinstance(values.get(key), dict)}
    return values | overrides | {key: _overridden(values[key], overrides[key]) for key in both}


def load_settings(path: str | Path = "params.yaml") -> Settings:
    """Reads and validates all settings. Raises DynarouteError, naming the key, its value and what is allowed."""
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise DynarouteError(f"{path}: must be a mapping of settings, not {type(data).__name__}")
    try:
        return Settings.model_validate(data)
    except DynarouteError as error:  # of overrides
        raise DynarouteError(f"{path}: {error}") from error
    except ValidationError as error:
        raise DynarouteError(f"{path}: {one_line(error, data)}") from error
