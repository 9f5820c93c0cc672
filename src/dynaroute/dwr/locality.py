"""Locality of routing, which training can reward: tokens that use experts which their own text used before.

What is added to the loss, and how often bonuses are drawn, is `objective.py`'s business.

    B batch, T tokens, E experts, K = top_k
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def reuse_loss(scores: Tensor, chosen: Tensor, half_life: float) -> Tensor:
    """How unlikely the router makes the experts that a token's own sequence used recently.

    p_t is the softmax of a layer's router scores for token t. c_s[e] is 1 / K if token s used expert e, else 0. m_t is
    the mean of all c_s with s < t, weighted by `2^(-(t - 1 - s) / half_life)`. Then

        loss_t = KL(m_t || p_t) = sum_e m_t[e] * (log m_t[e] - log p_t[e])

    A token is pulled towards its past, and no token towards its future. The gradient for the scores of token t is
    `p_t - m_t`, which is bounded. m_t is made of what was used, not of earlier p_s: those can agree to the last digit
    while their flat top changes with every token, and it is the top that a cache sees. Using the same experts for every
    text would have no loss, so the experts need a balance, of many sequences together.

    It costs `2 B T^2 E` operations and a matrix of T^2 weights: for T 128 and E 8, 0.3 million for a sequence.

    Args:
        scores: [B, T, E], with gradient.
        chosen: [B, T, K] int64, each token's experts.
        half_life: of a past token's weight, in tokens.

    Returns:
        [B, T] in nats; 0 for the first token, which has no past.
    """
    time = scores.shape[1]
    log_p = scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # [B, T, E]
    used = torch.zeros_like(log_p).scatter_(-1, chosen, 1 / chosen.shape[-1])  # [B, T, E]
    position = torch.arange(time, device=scores.device, dtype=log_p.dtype)
    age = position[1:, None] - 1 - position  # [T-1, T], of each token as seen by those after the first
    weights = torch.exp2(-age / half_life).masked_fill(age < 0, 0)
    mean = (weights / weights.sum(1, keepdim=True)) @ used  # [B, T-1, E]
    return F.pad(F.kl_div(log_p[:, 1:], mean, reduction="none").sum(-1), (1, 0))


class SimulatedCache(NamedTuple):
    """A cache of each layer, for each sequence by itself: empty at first, and LRU."""

    experts: int  # that it holds, at least top_k
    bonus: Tensor  # [B], added to the scores of those it holds, in logits


@torch.no_grad()
def choose_with_cache(scores: Tensor, top_k: int, cache: SimulatedCache) -> Tensor:
    """Chooses the experts of one layer as cache-aware inference would, token by token.

    A token's experts are those with the largest score plus bonus; then the cache holds them in place of the least
    recently used. Of experts that one token uses, that with the larger number counts as used last, as in `Residency`.

    It takes T rounds of a few small operations, whatever B: 3 ms a layer for T 128 on a CPU. A GPU waits for the
    launch of each.

    Args:
        scores: [B, T, E], what experts are chosen by.
        top_k: experts of a token.
        cache: with a bonus for each sequence.

    Returns:
        [B, T, K] int64, the first choice first. A token's do not depend on later ones, nor on other sequences.
    """
    batch, time, num_experts = scores.shape
    last_use = scores.new_full((batch, num_experts), -1, dtype=torch.int64)  # -1: never
    chosen = []
    for token in range(time):
        oldest = last_use.topk(cache.experts).values[:, -1:].clamp(min=0)  # [B, 1]
        held = last_use >= oldest  # [B, E]
        picked = (scores[:, token] + cache.bonus[:, None] * held).topk(top_k).indices  # [B, K]
        last_use.scatter_(1, picked, token * num_experts + picked)
        chosen.append(picked)
    return torch.stack(chosen, 1)
