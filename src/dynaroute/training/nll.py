"""The negative log-likelihood, in nats, that every model is trained on and scored by, and the KL divergence."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def nll(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
    """NLL of targets [B, T] under logits [B, T, V] of any float dtype, in float32; ignored targets count for nothing.

    It is of one number, or for "none" of every target: [B, T], 0 where it is ignored.
    """
    found = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
    return found.view_as(targets) if reduction == "none" else found


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The same to the bit as `nll` for "none", with less memory: float32 logits of one sequence at a time."""
    pairs = zip(logits.split(1), targets.split(1), strict=True)
    return torch.cat([nll(*pair, "none") for pair in pairs])


def kl_divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL(expected || logits) at every position, both given as logits, in nats: [B, T, V] -> [B, T], float32.

    One sequence at a time, since it takes several copies.
    """
    pairs = zip(expected, logits, strict=True)
    both = ((theirs.float().log_softmax(-1), own.float().log_softmax(-1)) for theirs, own in pairs)
    return torch.stack([F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1) for theirs, own in both])
