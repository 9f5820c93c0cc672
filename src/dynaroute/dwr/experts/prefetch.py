"""Predictions of the experts that the next layer will need, made while a layer computes, for a cache to prefetch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dynaroute.config.dwr import PrefetchName
from dynaroute.dwr.experts.checkpoint import CheckpointStore
from dynaroute.dwr.experts.store import ExpertStore

Router = Callable[[Tensor], Tensor]  # states [S, D] to scores [S, E]


class Prediction(NamedTuple):
    """The experts that a layer will need, the most probable first."""

    layer: int
    experts: list[int]


class Prefetcher(Protocol):
    """The interface of all prefetchers."""

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """A prediction from the input and output of a layer's router; None without one.

        Args:
            layer: whose router it is.
            state: [S, D], the router's input.
            scores: [S, E], its output, before the softmax.
        """


class FrequencyPrefetcher:
    """The experts that the next layer uses most on the validation split, for any token."""

    def __init__(self, load: list[list[float]], m: int) -> None:
        self._most_used = [torch.tensor(row).topk(m).indices.tolist() for row in load]

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """See `Prefetcher`."""
        return Prediction(layer + 1, self._most_used[layer + 1]) if layer + 1 < len(self._most_used) else None


class TransitionPrefetcher:
    """The experts that tokens with this layer's experts used most in the next layer, on the validation split."""

    def __init__(self, transitions: list[list[list[int]]], top_k: int, m: int) -> None:
        counts = torch.tensor(transitions, dtype=torch.float32)  # [L-1, E, E]
        self._probability = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        self._top_k, self._m = top_k, m

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """See `Prefetcher`."""
        if layer == len(self._probability):
            return None
        chosen = scores.topk(self._top_k).indices.flatten().to(self._probability.device)  # [S*K]
        return Prediction(layer + 1, self._probability[layer][chosen].sum(0).topk(self._m).indices.tolist())


class GatePrefetcher:
    """Gate lookahead: the output of the next layer's router for this layer's state."""

    def __init__(self, routers: Sequence[Router], m: int) -> None:
        self._routers, self._m = routers, m

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """See `Prefetcher`."""
        target = layer + 1
        if target >= len(self._routers):
            return None
        probability = self._routers[target](state).softmax(-1, dtype=torch.float32)  # [S, E]
        return Prediction(target, probability.sum(0).topk(self._m).indices.tolist())


def make_prefetcher(
    name: PrefetchName, store: ExpertStore | CheckpointStore, routers: Sequence[Router], m: int
) -> Prefetcher | None:
    """A prefetcher of `m` experts by name, for the model in a store; `routers` are those of its layers."""
    match name:
        case "none":
            return None
        case "frequency":
            return FrequencyPrefetcher(store.usage.load, m)
        case "transition":
            return TransitionPrefetcher(store.usage.transitions, store.config.top_k, m)
        case "gate":
            return GatePrefetcher(routers, m)
