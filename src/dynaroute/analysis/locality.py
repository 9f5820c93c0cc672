"""How well the experts of a trained model cache, and what of that is due to the text, to its order or to the cache."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynaroute.analysis.dwr_runs import hit_rates
from dynaroute.analysis.replay import Seconds, ratio_to_resident, replay
from dynaroute.analysis.traces import BATCH, Trace
from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.dwr.experts.policies import LRU
from dynaroute.dwr.experts.residency import Residency
from dynaroute.dwr.locality import SimulatedCache
from dynaroute.dwr.model import DWRTransformer
from dynaroute.training.nll import kl_divergence, nll


def all_hit_rates(trace: Trace, num_experts: int, capacity: int) -> dict[str, float]:
    """Those of `hit_rates`, and `lru_per_layer`: of LRU with equal shares of the layers, NaN if one has no expert."""
    _, num_layers, top_k = trace.experts.shape
    rates = hit_rates(trace, num_experts, capacity)
    if capacity < num_layers:
        return rates | {"lru_per_layer": float("nan")}
    residency = Residency(capacity, LRU(), num_layers, top_k, per_layer=True)
    replay(trace, residency)
    return rates | {"lru_per_layer": residency.statistics.hit_rate}


def tokens_per_second(trace: Trace, capacity: int, machines: Mapping[str, Seconds]) -> dict[str, float]:
    """The simulated speed of decoding a trace on each machine, with LRU under one budget and no prefetching."""
    tokens, num_layers, top_k = trace.experts.shape
    calls = replay(trace, Residency(capacity, LRU(), num_layers, top_k))
    computed = sum(len(call.used) for call in calls)
    return {
        name: tokens * ratio_to_resident(calls, seconds) / (len(calls) * seconds.dense + computed * seconds.expert)
        for name, seconds in machines.items()
    }


class ShuffledText:
    """Windows with the same tokens in a random order, always the same: text without its locality."""

    def __init__(self, windows: WindowSet) -> None:
        self.windows, self.seq_len = windows, windows.seq_len

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.windows)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Windows as (tokens, targets), both int64 [B, T]; padding stays at the end, and no target fits its token."""
        tokens, targets = self.windows.batch(indices)
        for row, (own, target) in enumerate(zip(tokens, targets, strict=True)):
            kept = int((target != IGNORED_TARGET).sum())
            order = np.random.default_rng(indices[row]).permutation(kept)
            own[:kept] = own[torch.from_numpy(order)]
        return tokens, targets


def shuffled_trace(trace: Trace) -> Trace:
    """The same tokens' experts in a random order: each is used as often as before, by tokens that do not follow."""
    order = np.random.default_rng(0).permutation(len(trace.experts))
    return Trace(trace.run, trace.experts[order], trace.lookahead[order])


class CacheAware(NamedTuple):
    """What cache-aware routing, which is inexact, does with held-out text."""

    loss: float  # nats per token
    exact_loss: float
    kl: float  # KL(exact || cache-aware) of the next token, in nats, the mean over tokens
    trace: Trace


@torch.inference_mode()
def route_cache_aware(model: DWRTransformer, windows: WindowSet, experts: int, alpha: float) -> CacheAware:
    """Reads windows with exact routing, and as token-by-token decoding with `--cache-aware alpha` would.

    The cache is LRU and has equal shares of the layers, with room for `experts` of each; every window starts with an
    empty one. The trace has no lookahead.
    """
    sums, chosen = torch.zeros(4, dtype=torch.float64), []
    for start in range(0, len(windows), BATCH):
        tokens, targets = windows.batch(range(start, min(start + BATCH, len(windows))))
        kept = targets != IGNORED_TARGET  # [B, T]
        exact = model(tokens).logits
        aware = model(tokens, simulated=SimulatedCache(experts, torch.full((len(tokens),), alpha)))
        losses = [nll(logits, targets, "none").sum() for logits in (aware.logits, exact)]
        sums += torch.stack([*losses, kl_divergence(exact, aware.logits)[kept].sum(), kept.sum()])
        chosen.append(torch.stack([layer.chosen for layer in aware.router], 2)[kept])  # [tokens, L, K]
    experts_used = torch.cat(chosen).numpy().astype(np.uint16)
    nothing = np.zeros((len(experts_used), model.config.num_layers - 1, model.config.num_experts), np.uint16)
    means: list[Any] = (sums[:3] / sums[3]).tolist()
    return CacheAware(*means, Trace("", experts_used, nothing))
