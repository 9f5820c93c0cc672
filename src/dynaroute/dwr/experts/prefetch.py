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
    probabilities: list[float]  # of each, as the prefetcher sees it; `payoff.py` calibrates them


def _most_probable(layer: int, weight: Tensor, top_k: int, m: int) -> Prediction:
    """The `m` experts of the largest weights [E].

    The odds of an expert are its weight over that of its rival: the first expert that is not chosen, for one of the
    first `top_k`, otherwise the last that is. With probabilities of a softmax that is the difference of two scores.
    """
    weights, experts = (part.tolist() for part in weight.topk(min(len(weight), max(m, top_k + 1))))
    first_out = weights[top_k] if top_k < len(weights) else 0.0
    rivals = [first_out if rank < top_k else weights[top_k - 1] for rank in range(m)]
    odds = zip(weights[:m], rivals, strict=True)
    return Prediction(layer, experts[:m], [own / (own + rival) if own else 0.0 for own, rival in odds])


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

    def __init__(self, load: list[list[float]], top_k: int, m: int) -> None:
        self._most_used = [_most_probable(layer, torch.tensor(row), top_k, m) for layer, row in enumerate(load)]

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """See `Prefetcher`."""
        return self._most_used[layer + 1] if layer + 1 < len(self._most_used) else None


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
        return _most_probable(layer + 1, self._probability[layer][chosen].sum(0), self._top_k, self._m)


class GatePrefetcher:
    """Gate lookahead: the output of the next layer's router for this layer's state."""

    def __init__(self, routers: Sequence[Router], top_k: int, m: int) -> None:
        self._routers, self._top_k, self._m = routers, top_k, m

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """See `Prefetcher`."""
        target = layer + 1
        if target >= len(self._routers):
            return None
        probability = self._routers[target](state).softmax(-1, dtype=torch.float32)  # [S, E]
        return _most_probable(target, probability.sum(0), self._top_k, self._m)


def make_prefetcher(
    name: PrefetchName, store: ExpertStore | CheckpointStore, routers: Sequence[Router], m: int
) -> Prefetcher | None:
    """A prefetcher of `m` experts by name, for the model in a store; `routers` are those of its layers."""
    match name:
        case "none":
            return None
        case "frequency":
            return FrequencyPrefetcher(store.usage.load, store.config.top_k, m)
        case "transition":
            return TransitionPrefetcher(store.usage.transitions, store.config.top_k, m)
        case "gate":
            return GatePrefetcher(routers, store.config.top_k, m)
