"""The negative log-likelihood of a frozen base, window by window, under the wirings that a predictor gives them.

Windows are whole: each has T targets. Nothing here draws noise: the same weights and windows give the same bytes.

    n windows   B batch   T tokens   V vocabulary   N nodes
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.training.nll import kl_divergence, token_nll

if TYPE_CHECKING:
    from dynaroute.dagformer.predictor import StructurePredictor

TEXTS = {"window": "test", "prefix": "test_prefix"}  # names of the embeddings that a protocol wires by
BATCH = 8  # windows. A constant: float sums depend on it, and the baseline must not differ between variants


class Wiring(NamedTuple):
    """What a predictor makes of n texts, on the CPU; float32 [n, N, N] each."""

    logits: Tensor  # Z, -inf where not valid
    soft: Tensor  # A of mode soft, cascade included
    hard: Tensor

    def gates(self, mode: str) -> Tensor:
        """The valid entries of a mode's A, [n, E]."""
        return getattr(self, mode)[:, self.logits[0] > -torch.inf]


def first_scored(prefix_tokens: int) -> dict[str, int]:
    """By protocol, the first scored position: for the prefix, the one that predicts the first token not read."""
    return {"window": 0, "prefix": prefix_tokens - 1}


def mean_nll(nll: Tensor, first: int = 0) -> np.ndarray:
    """Mean NLL of each window over its scored positions, in nats per token, float64 [n].

    Args:
        nll: [n, T] float32, from `token_nll`.
        first: the first scored position.
    """
    scored = nll.double()
    scored[:, :first] = 0
    return (scored.sum(1) / (nll.shape[1] - first)).numpy()


@torch.no_grad()
def wire(predictor: "StructurePredictor", embeddings: Tensor, tau: float) -> Wiring:
    """The wirings of n texts, without noise, from their embeddings [n, E] at temperature tau."""
    device = next(predictor.parameters()).device
    parts = []
    for batch in embeddings.split(BATCH):
        batch = batch.to(device)
        parts.append((predictor.logits(batch), predictor(batch, tau, "soft"), predictor(batch, tau, "hard")))
    return Wiring(*(torch.cat([part.float().cpu() for part in kind]) for kind in zip(*parts, strict=True)))


def window_nll(graph: DagForward, windows: WindowSet, adjacency: Tensor, first: int = 0) -> np.ndarray:
    """Mean NLL of each of n windows under its wiring, in nats per token, float64 [n].

    Args:
        graph, windows, adjacency: see `position_nll`.
        first: see `mean_nll`.
    """
    return mean_nll(position_nll(graph, windows, adjacency), first)


@torch.no_grad()
def position_nll(graph: DagForward, windows: WindowSet, adjacency: Tensor) -> Tensor:
    """NLL of every target of n windows under their wirings, in nats, float32 [n, T] on the CPU.

    Args:
        graph: the base.
        windows: n of them.
        adjacency: [n, N, N], or [N, N] for all windows.
    """
    adjacency = adjacency.expand(len(windows), -1, -1)
    losses = []
    for indices in batches(len(windows)):
        tokens, targets = (part.to(graph.base.device) for part in windows.batch(indices))
        wirings = adjacency[indices.start : indices.stop].to(graph.base.device)
        losses.append(token_nll(graph(tokens, wirings), targets).cpu())
    return torch.cat(losses)


@torch.no_grad()
def compare_to_base(
    graph: DagForward, base: DagForward, windows: WindowSet, wirings: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """NLL of every target under several wirings, and the KL divergence of what they predict from what the base does.

    Args:
        graph: what the wirings wire.
        base: the model as it is: with all its gates at 1.
        windows: n of them.
        wirings: [n, N, N] each.

    Returns:
        NLL and KL(base || wired), in nats, float32 [n, T] each on the CPU, by the names of the wirings; NLL also of
        `baseline`, the base.
    """
    opened = dag_mask(base.num_layers, base.num_heads).float()
    nll: dict[str, list[Tensor]] = {name: [] for name in ("baseline", *wirings)}
    kl: dict[str, list[Tensor]] = {name: [] for name in wirings}
    for indices in tqdm(list(batches(len(windows))), desc="evaluation", unit="batch", disable=None):
        tokens, targets = (part.to(graph.base.device) for part in windows.batch(indices))
        expected = base(tokens, opened.expand(len(tokens), -1, -1).to(tokens.device))
        nll["baseline"].append(token_nll(expected, targets).cpu())
        for name, adjacency in wirings.items():
            logits = graph(tokens, adjacency[indices.start : indices.stop].to(tokens.device))
            nll[name].append(token_nll(logits, targets).cpu())
            kl[name].append(kl_divergence(expected, logits).cpu())
    return {name: torch.cat(parts) for name, parts in nll.items()}, {name: torch.cat(own) for name, own in kl.items()}


def batches(n: int) -> Iterator[range]:
    """The indices of n windows in batches of BATCH."""
    return (range(start, min(start + BATCH, n)) for start in range(0, n, BATCH))
