"""Checkpoints as single safetensors files: tensors, and a state as JSON in the header. Nothing is ever unpickled.

One file is one rename, so a checkpoint is whole or absent. Its SHA-256, of state and tensors, is in the header too, as
part of the state: one header key keeps the bytes the same on every run (safetensors writes several in any order).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_file


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes tensors and a JSON-serialisable state to one file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with output_file(path) as temporary:
        header = json.dumps({"sha256": _sha256(tensors, state), **state}, allow_nan=False)
        save_file(tensors, temporary, metadata={"state": header})


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_checkpoint` wrote, on the CPU.

    Raises:
        DynarouteError: the file is missing, damaged, or not a checkpoint of ours.
    """
    tensors, state = read_safetensors(path)
    expected, found = state.pop("sha256", None), _sha256(tensors, state)
    if found != expected:
        raise DynarouteError(f"{path}: damaged: SHA-256 of its content is {found}, not {expected}")
    return tensors, state


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, on the CPU, and the state in its header, unchecked.

    Raises:
        DynarouteError: the file is missing, is no safetensors file, or has no state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            if not isinstance(state, dict):
                raise ValueError("its state is no mapping")
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118, not a dict
    except FileNotFoundError as error:
        raise DynarouteError(f"{path}: no such checkpoint") from error
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DynarouteError(f"{path}: not a readable checkpoint ({error})") from error


def _sha256(tensors: dict[str, Tensor], state: dict[str, Any]) -> str:
    """Of all that a checkpoint says: state, and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: str | Path, assign: bool = False) -> None:
    """Copies tensors into the model's parameters, or with `assign` makes them its parameters.

    Names and shapes must be exactly the model's own.

    Raises:
        DynarouteError: names or shapes differ; `path` is named as where the tensors came from.
    """
    own = model.state_dict()
    for name in [*own, *tensors]:
        if name not in own or name not in tensors:
            raise DynarouteError(f"{path}: {name} is {'missing' if name in own else 'not part of this model'}")
        if own[name].shape != tensors[name].shape:
            found, expected = list(tensors[name].shape), list(own[name].shape)
            raise DynarouteError(f"{path}: {name} has shape {found}; the model's is {expected}")
    model.load_state_dict(tensors, assign=assign)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state under names made of the parameters' own."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `optimizer_tensors` returned, without learning rates: the loop sets them at each step."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        by_parameter.setdefault(parameter, {})[key] = value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_parameter[name] for index, name in enumerate(order) if name in by_parameter}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
