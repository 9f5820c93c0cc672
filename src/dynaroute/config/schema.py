"""Building blocks of settings: value types, strictly typed sections, and mistakes explained in one line."""

import difflib
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML, YAMLError

from dynaroute.errors import DynarouteError

MAX_SEED = 2**63 - 1
MAX_THREADS = 1024
TEMPERATURES = (1e-6, 1e6)  # float32 holds these, their inverses, and products with logits and gradients
SMALLEST = 1e-12  # except 0: float32 holds its square, and a mistyped exponent is noticed

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Size = Annotated[int, Field(gt=0, le=2**20)]  # of a tensor; no model has a larger width, or more layers or experts
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
TwoOrMore = Annotated[int, Field(ge=2, lt=2**31)]  # for samples whose spread is estimated
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # becomes a folder's name
PositiveFloat = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Moderate = Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]  # for temperatures and other divisors
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
    """Base of all settings: typed strictly, immutable, closed to unknown keys and to tiny numbers."""

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
            for value in data[key] if isinstance(data[key], list) else [data[key]]:
                if isinstance(value, float) and 0 < abs(value) < SMALLEST:
                    raise invalid(key, value, f"must be at least {SMALLEST}, or 0 where that is allowed")
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


def read_yaml(path: str | Path) -> Any:
    """Reads YAML 1.2, in which DVC's `1e-05` is a float; to PyYAML's 1.1 it is a string. Raises DynarouteError."""
    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DynarouteError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (YAMLError, ValueError, IndexError, RecursionError) as error:  # the others come from numbers and dates
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = str(getattr(error, "problem", error)).partition("\n")[0]
        raise DynarouteError(f"{path}{line}: not valid YAML: {problem}") from error


def one_line(error: ValidationError, data: Any) -> str:
    """The first problem as "key = value: what is allowed", and the number of other keys with a problem."""
    problems: dict[str, list[str]] = {}  # allowed values by key and value: each member of a union gives an answer
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
    """The path of keys in the file; a problem's location also contains tags of unions, which are not keys."""
    keys, at = [], data
    for part in problem["loc"]:
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int)):
            keys.append(str(part))
            at = at[part]
    return [*keys, str(problem["loc"][-1])] if problem["type"] == "missing" else keys
