"""Gates: from logits to the adjacency of a DAG of attention heads, and measures of it.

Node (l, h) of L layers x H heads has index l * H + h, N = L * H. An adjacency A is [..., N, N]; A[i, j] gates what
source i sends to target j and is valid only where layer(j) > layer(i): everywhere else it is exactly 0.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from dynaroute.errors import DynarouteError

Mode = Literal["train", "soft", "hard"]
Kind = Literal["logistic", "straight_through", "hard_concrete"]
BISECTIONS = 30  # halve a span of logits to the resolution of float32
STRETCH = (-0.1, 1.1)  # of hard concrete gates, as in Louizos et al., 2018


def layer_distance(num_layers: int, num_heads: int, device: torch.device | None = None) -> Tensor:
    """layer(target) - layer(source) of every entry, [N, N] int64: above 0 valid, 1 adjacent layers, more a skip."""
    layer = torch.arange(num_layers * num_heads, device=device) // num_heads
    return layer[None, :] - layer[:, None]


def dag_mask(num_layers: int, num_heads: int, device: torch.device | None = None) -> Tensor:
    """The valid entries of an adjacency, [N, N] bool: those whose target lies in a later layer than their source."""
    return layer_distance(num_layers, num_heads, device) > 0


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise for `gumbel_sigmoid`, float32 on the generator's device: a logistic is the difference of two Gumbels.

    The caller's generator is the only source of randomness. A CPU generator gives every device the same noise.
    """
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    uniform.clamp_(min=torch.finfo(uniform.dtype).tiny)  # rand includes 0, whose logit is infinite, but never 1
    return torch.logit(uniform)


def gumbel_sigmoid(
    logits: Tensor, tau: float | Tensor, mode: Mode, noise: Tensor | None = None, kind: Kind = "logistic"
) -> Tensor:
    """Gates from logits Z, elementwise (the binary concrete relaxation of Maddison et al. and Jang et al., 2017).

    Kinds, with s = sigmoid((Z + noise) / tau) in mode train and s = sigmoid(Z / tau) in mode soft:
        logistic          s
        straight_through  mode train: 1 where s > 0.5, else 0, with the gradient of s (Bengio et al., 2013); soft: s
        hard_concrete     s stretched to STRETCH and clipped to [0, 1] (Louizos et al., 2018), which reaches 0 and 1

    Args:
        logits: Z, [..., N, N]. An entry of -inf is a gate of exactly 0 with no gradient, in every mode: fill the
            entries outside `dag_mask` with it.
        tau: temperature above 0.
        mode: train, with noise; soft, without; hard, 1 where Z > 0 (no gradient), whatever the kind.
        noise: in mode train only; broadcasts to the shape of logits; see `logistic_noise`.
        kind: see above.

    Returns:
        Gates of the shape and dtype of logits.

    Raises:
        DynarouteError: an unknown mode, train without noise, noise outside train, or a temperature that is not above 0.
    """
    if mode not in ("train", "soft", "hard"):
        raise DynarouteError(f"mode = {mode!r}: must be one of train, soft, hard")
    if (noise is not None) != (mode == "train"):
        raise DynarouteError(f"mode = {mode!r}: noise must be given in mode train, and in no other")
    if not isinstance(tau, Tensor) and not tau > 0:  # a tensor is not looked at: that would wait for the GPU
        raise DynarouteError(f"tau = {tau}: must be above 0")
    if mode == "hard":
        return (logits > 0).to(logits.dtype)
    if noise is not None:
        logits = logits + noise.to(logits)
    gates = torch.sigmoid(logits / tau)
    if kind == "hard_concrete":
        low, high = STRETCH
        return torch.clamp(gates * (high - low) + low, 0, 1)
    if kind == "straight_through" and mode == "train":
        return gates + ((gates > 0.5).to(gates) - gates).detach()
    return gates


def hold_share(logits: Tensor, entries: Tensor, share: float, mode: Mode) -> Tensor:
    """Logits less one number for each adjacency, so that a given share of its gates is open.

    In mode train that is the expected share over logistic noise: the number s solves mean(sigmoid(Z - s)) = share, and
    has the gradient of that solution, ds/dZ_i = w_i / sum(w) with w = sigmoid'(Z - s). So a gate opens at the expense
    of others. In the other modes as many logits as the share says are above 0; equal ones are on the same side.

    Args:
        logits: Z, [..., N, N].
        entries: those that count, [N, N] bool.
        share: between 0 and 1.
        mode: see `gumbel_sigmoid`.
    """
    values = logits[..., entries.to(logits.device)]  # [..., E]
    if mode != "train":
        kept = values.detach().topk(max(1, round(share * values.shape[-1])), dim=-1).values[..., -1:]
        shift = torch.nextafter(kept, torch.full_like(kept, -torch.inf))
    else:
        with torch.no_grad():
            offset = math.log(share / (1 - share))
            low, high = (end(-1, keepdim=True) - offset for end in (values.amin, values.amax))
            for _ in range(BISECTIONS):
                shift = (low + high) / 2
                too_open = torch.sigmoid(values - shift).mean(-1, keepdim=True) > share
                low, high = torch.where(too_open, shift, low), torch.where(too_open, high, shift)
        opened = torch.sigmoid(values - shift)
        slope = (opened * (1 - opened)).mean(-1, keepdim=True).detach()
        shift = shift + (opened.mean(-1, keepdim=True) - share) / slope  # a step of Newton's, which has the gradient
    return logits - shift[..., None]


def gate_slope(logits: Tensor, tau: float | Tensor, noise: Tensor, kind: Kind) -> Tensor:
    """dA/dZ of `gumbel_sigmoid` in mode train, elementwise."""
    gates = torch.sigmoid((logits + noise.to(logits)) / tau)
    slope = gates * (1 - gates) / tau
    if kind != "hard_concrete":
        return slope
    low, high = STRETCH
    stretched = gates * (high - low) + low
    return slope * (high - low) * ((stretched > 0) & (stretched < 1))


def cascade(
    adjacency: Tensor, k: float | Tensor, num_heads: int, hard: bool, exempt_first_layer: bool = True
) -> Tensor:
    """The cascading gate: a node that receives nothing sends nothing.

    inc_j = sum_i A[i, j] from the adjacency as it comes in, g_j = sigmoid(k * inc_j), or inc_j > 0 when hard;
    row j, all that node j sends, is multiplied by g_j.

    Args:
        adjacency: [..., N, N]; entries that are not valid are taken as 0.
        k: steepness, a number or a learnable scalar tensor; not used when hard.
        num_heads: H, to tell the layers apart.
        hard: whether the gates of the adjacency are 0 or 1.
        exempt_first_layer: layer 0 has no incoming edges by construction, so its g is set to 1. False is the
            published bug, kept to show it: in hard mode layer 0 then never reaches any other layer.

    Returns:
        The gated adjacency, of the same shape and dtype, 0 where not valid.

    Raises:
        DynarouteError: N is not a multiple of num_heads.
    """
    num_nodes = adjacency.shape[-1]
    if num_nodes % num_heads:
        raise DynarouteError(f"num_heads = {num_heads}: must divide the {num_nodes} nodes of the adjacency")
    adjacency = adjacency.masked_fill(~dag_mask(num_nodes // num_heads, num_heads, adjacency.device), 0)
    incoming = adjacency.sum(-2)  # [..., N]
    gate = (incoming > 0).to(adjacency.dtype) if hard else torch.sigmoid(k * incoming)
    if exempt_first_layer:
        gate = torch.cat([torch.ones_like(gate[..., :num_heads]), gate[..., num_heads:]], dim=-1)
    return adjacency * gate[..., :, None]


def density(adjacency: Tensor, entries: Tensor) -> Tensor:
    """Mean gate over the given entries ([N, N] bool, such as `dag_mask`), float32 [...], one per adjacency.

    A mean over all N x N entries would count the structural zeros and read 0.42 where this reads 0.89.
    """
    return adjacency[..., entries.to(adjacency.device)].float().mean(-1)


def gate_fraction(adjacency: Tensor, entries: Tensor) -> Tensor:
    """Fraction of gates above 0.5 among the given entries, float32 [...], one per adjacency.

    `layer_distance(L, H) == 1` gives the report's seq_gate_frac, `> 1` its hyp_gate_frac.
    """
    return density(adjacency > 0.5, entries)
