"""A profile of a user's own traffic: how many tokens used each expert, for policies and prefetchers.

It belongs to one model, named by the hash of its weights outside of the experts.
"""

import hashlib
from pathlib import Path
from typing import Self

import torch
from pydantic import ValidationError, ValidationInfo, model_validator
from torch import Tensor, nn

from dynaroute.config.schema import Section
from dynaroute.dwr.experts.store import Usage
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_text


class _Profile(Section):
    """Content of a profile's file."""

    model: str
    usage: Usage  # load: tokens, not shares of them

    @model_validator(mode="after")
    def _has_the_models_sizes(self, info: ValidationInfo) -> Self:
        if info.context:
            self.usage.refuse_other_sizes(*info.context)
        return self


class UsageCounter:
    """Counts the tokens that use an expert, and those that use one and then another in the next layer."""

    def __init__(self, model: str, num_layers: int, num_experts: int, start: Usage | None = None) -> None:
        """From zero, or from earlier counts; `model` is its hash."""
        self._model = model
        self._load = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._transitions = torch.zeros(num_layers - 1, num_experts, num_experts, dtype=torch.int64)
        if start:
            self._load += torch.tensor(start.load).long()
            self._transitions += torch.tensor(start.transitions, dtype=torch.int64).view_as(self._transitions)

    def count(self, layer: int, chosen: Tensor) -> None:
        """Counts the experts [S, K] that tokens chose in a layer; the layers of a forward pass come in order."""
        used = torch.zeros(len(chosen), self._load.shape[1]).scatter_(1, chosen.cpu(), 1)  # [S, E], exact up to 2^24
        self._load[layer] += used.sum(0).long()
        if layer:
            self._transitions[layer - 1] += (self._before.T @ used).long()
        self._before = used

    def save(self, path: str | Path) -> None:
        """Writes the counts as a profile."""
        usage = Usage(load=self._load.tolist(), transitions=self._transitions.tolist())
        write_text(path, _Profile(model=self._model, usage=usage).model_dump_json() + "\n")


@torch.inference_mode()
def backbone_hash(model: nn.Module) -> str:
    """The SHA-256 of a model's weights that are in memory, for which experts of a cache are not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_meta:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_profile(path: str | Path, model: str, num_layers: int, num_experts: int) -> Usage:
    """Reads the profile of the model with this hash.

    Raises:
        DynarouteError: it is missing, damaged or another model's.
    """
    record = read_record(path)
    if record["model"] != model:
        raise DynarouteError(f"{path}: model = {record['model']!s:.12}: the profile must be of this model, {model:.12}")
    try:
        return _Profile.model_validate(record, context=(num_layers, num_experts)).usage
    except ValidationError as error:
        first = error.errors()[0]
        raise DynarouteError(f"{path}: {'.'.join(map(str, first['loc'])) or 'usage'}: {first['msg']:.200}") from error
