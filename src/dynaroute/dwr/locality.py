"""Locality of routing: how like its past a token's routing is, which training can reward.

B batch, T tokens, E experts
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reuse_loss(scores: Tensor, half_life: float) -> Tensor:
    """How far each token's router distribution is from the recent ones of its own sequence.

    With p_t the softmax of a layer's router scores for token t, and m_t the mean of all p_s with s < t, weighted by
    `2^(-(t - 1 - s) / half_life)`:

        loss_t = KL(m_t || p_t) = sum_e m_t[e] * (log m_t[e] - log p_t[e])

    m_t is detached: a token is pulled towards its past, and no token towards its future. The gradient for the scores of
    token t is `p_t - m_t`, which is bounded. A constant router has no loss, whether it is flat or peaked: balance and
    the NLL decide which.

    It costs `2 B T^2 E` operations and a matrix of T^2 weights: for T 128 and E 8, 0.3 million for a sequence.

    Args:
        scores: [B, T, E], with gradient.
        half_life: of a past token's weight, in tokens.

    Returns:
        [B, T] in nats; 0 for the first token, which has no past.
    """
    time = scores.shape[1]
    log_p = scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # [B, T, E]
    position = torch.arange(time, device=scores.device, dtype=log_p.dtype)
    age = position[1:, None] - 1 - position  # [T-1, T], of each token as seen by those after the first
    weights = torch.exp2(-age / half_life).masked_fill(age < 0, 0)
    mean = (weights / weights.sum(1, keepdim=True)) @ log_p.detach().exp()  # [B, T-1, E]
    return F.pad(F.kl_div(log_p[:, 1:], mean, reduction="none").sum(-1), (1, 0))
