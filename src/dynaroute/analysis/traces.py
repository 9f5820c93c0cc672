"""Traces of routing: the experts that every token of held-out text uses, and those that gate lookahead predicts."""

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
import torch

from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.dwr.inference import routers
from dynaroute.dwr.model import DWRTransformer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, read_record, write_json

BATCH = 16  # windows


class Trace(NamedTuple):
    """Routing of text read token by token, window after window."""

    run: str  # the training of the model
    experts: np.ndarray  # uint16 [tokens, L, K]: a token's experts in each layer, the most probable first
    lookahead: np.ndarray  # float32 [tokens, L - 1, E]: scores of layer l + 1's router for the state of layer l

    def calls(self) -> Iterator[tuple[int, list[int]]]:
        """(layer, experts) in the order in which a cache gets the calls."""
        for token in np.sort(self.experts).tolist():  # in the order in which a model requests them
            yield from enumerate(token)


@torch.inference_mode()
def record_routing(model: DWRTransformer, windows: WindowSet, run: str) -> Trace:
    """Records windows, each as a text by itself, without its padding."""
    rankings, states = routers(model), {}
    hooks = [
        block.moe.router.register_forward_pre_hook(lambda _, inputs, layer=layer: states.__setitem__(layer, inputs[0]))
        for layer, block in enumerate(model.layers)
    ]
    chosen, predicted = [], []
    for start in range(0, len(windows), BATCH):
        tokens, targets = windows.batch(range(start, min(start + BATCH, len(windows))))
        kept = (targets != IGNORED_TARGET).flatten()  # [B*T]
        statistics = model(tokens).router
        chosen.append(torch.stack([layer.chosen for layer in statistics], 2).flatten(0, 1)[kept])  # [tokens, L, K]
        # Not by calling the module: its hook would record another layer's state as its own.
        ahead = [choose_by(states[layer])[kept] for layer, choose_by in enumerate(rankings[1:])]
        nothing = torch.empty(len(chosen[-1]), 0, model.config.num_experts)  # if there is only one layer
        predicted.append(torch.stack(ahead, 1) if ahead else nothing)  # [tokens, L-1, E]
    for hook in hooks:
        hook.remove()
    return Trace(run, torch.cat(chosen).numpy().astype(np.uint16), torch.cat(predicted).numpy())


def uniform_trace(trace: Trace) -> Trace:
    """As many tokens as a trace has, with distinct experts drawn uniformly and independently. Always the same.

    A policy's hit rate on it is due to capacity alone.
    """
    (tokens, layers, top_k), num_experts = trace.experts.shape, trace.lookahead.shape[2]
    experts = np.broadcast_to(np.arange(num_experts, dtype=np.uint16), (tokens, 2 * layers - 1, num_experts))
    orders = np.random.default_rng(0).permuted(experts, axis=2)
    return Trace(trace.run, orders[:, :layers, :top_k], orders[:, layers:].astype(np.float32))


def count_transitions(experts: np.ndarray, num_experts: int) -> list[list[list[int]]]:
    """[L-1][E][E]: how many tokens of [tokens, L, K] use expert i of layer l and expert j of layer l + 1."""
    used = np.zeros((*experts.shape[:2], num_experts), np.int64)  # [tokens, L, E]
    np.put_along_axis(used, experts.astype(np.int64), 1, -1)
    return [(used[:, layer].T @ used[:, layer + 1]).tolist() for layer in range(experts.shape[1] - 1)]


def save_trace(trace: Trace, path: str | Path) -> None:
    """Writes a trace as a folder."""
    with output_directory(path) as folder:
        for name in ("experts", "lookahead"):
            np.save(folder / f"{name}.npy", getattr(trace, name), allow_pickle=False)
        write_json(folder / "metadata.json", {"run": trace.run})


def load_trace(path: str | Path) -> Trace:
    """Reads a trace from a folder.

    Raises:
        DynarouteError: it is missing or damaged.
    """
    path = Path(path)
    arrays = {}
    for name in ("experts", "lookahead"):
        file = path / f"{name}.npy"
        try:
            with file.open("rb") as content:
                arrays[name] = np.lib.format.read_array(content, allow_pickle=False)
        except (OSError, ValueError, TokenError) as error:
            raise DynarouteError(f"{file}: missing or damaged: {error}: run the stage trace_routing again") from error
    return Trace(read_record(path / "metadata.json")["run"], **arrays)
