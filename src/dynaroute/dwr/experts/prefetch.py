"""Which experts the next layer will need: predictions, made while a layer is at work, for a cache to read ahead by."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dynaroute.config import PrefetchName
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.dwr.model import DWRTransformer


class Prediction(NamedTuple):
    """The experts that a layer will need, the most probable first."""

    layer: int
    experts: list[int]


class Prefetcher(Protocol):
    """What every prefetcher offers."""

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """A prediction on the ground of what a layer's router was given and said; None: of nothing.

        Args:
            layer: whose router it is.
            state: [S, D], what the router was given.
            scores: [S, E], what it said, before the softmax.
        """


class FrequencyPrefetcher:
    """The experts that the next layer uses most on the validation split, whatever the tokens are."""

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
    """Gate lookahead: what the router of a later layer says of this layer's state.

    With `ahead = 0` it foretells the layer's own choice: right always, and a check of how accuracy is counted.
    """

    def __init__(self, routers: list[nn.Module], m: int, ahead: int = 1) -> None:
        self._routers, self._m, self._ahead = routers, m, ahead

    def predict(self, layer: int, state: Tensor, scores: Tensor) -> Prediction | None:
        """See `Prefetcher`."""
        target = layer + self._ahead
        if target >= len(self._routers):
            return None
        # Not the module itself, whose hook would ask for a prediction again.
        probability = self._routers[target].forward(state).softmax(-1, dtype=torch.float32)  # [S, E]
        return Prediction(target, probability.sum(0).topk(self._m).indices.tolist())


def make_prefetcher(name: PrefetchName, store: ExpertStore, model: DWRTransformer, m: int) -> Prefetcher | None:
    """A prefetcher of `m` experts by its name, for a model that runs from a store."""
    match name:
        case "none":
            return None
        case "frequency":
            return FrequencyPrefetcher(store.usage.load, m)
        case "transition":
            return TransitionPrefetcher(store.usage.transitions, store.config.top_k, m)
        case "gate":
            return GatePrefetcher([layer.moe.router for layer in model.layers], m)
