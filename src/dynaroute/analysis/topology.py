"""What is measured on a set of wirings. All means are over valid entries, see `dynaroute.dagformer.gates`.

n texts   L layers   H heads   N nodes = L * H   E valid entries
"""

import math

import torch
from torch import Tensor

from dynaroute.dagformer.gates import dag_mask, density, gate_fraction, layer_distance

ROUNDING = torch.finfo(torch.float64).eps


def measure(soft: Tensor, hard: Tensor, num_heads: int) -> dict[str, float | int]:
    """The measures of n texts' wirings that the reports show.

    Args:
        soft: A of mode soft, [n, N, N].
        hard: A of mode hard, of the same texts.
        num_heads: H.

    Returns:
        mean_A: mean soft gate.
        seq_gate_frac, hyp_gate_frac: fraction of soft gates above 0.5 between adjacent layers, and of those that skip.
        density_hard: mean hard gate.
        entropy_bits: mean of `gate_entropy`; 1 where a gate is undecided, 0 where it is open or shut.
        dead_heads: how many nodes are mute or deaf, see `mute_and_deaf`.
    """
    num_layers = soft.shape[-1] // num_heads
    valid, distance = dag_mask(num_layers, num_heads), layer_distance(num_layers, num_heads)
    mute, deaf = mute_and_deaf(hard, num_heads)
    return {
        "mean_A": _mean(density(soft, valid)),
        "seq_gate_frac": _mean(gate_fraction(soft, distance == 1)),
        "hyp_gate_frac": _mean(gate_fraction(soft, distance > 1)),
        "density_hard": _mean(density(hard, valid)),
        "entropy_bits": _mean(density(gate_entropy(soft), valid)),
        "dead_heads": int((mute | deaf).sum()),
    }


def gate_entropy(adjacency: Tensor) -> Tensor:
    """Binary entropy of every gate in bits, -a log2 a - (1 - a) log2(1 - a), of the adjacency's shape; 0 at 0 and 1."""
    return (torch.special.entr(adjacency) + torch.special.entr(1 - adjacency)) / math.log(2)


def mute_and_deaf(hard: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The nodes that no text of a set connects, two tensors [N] bool.

    A node is mute if in every text all its outgoing gates are shut, and deaf if in every text all its incoming ones
    are. By construction the last layer has no outgoing gates and layer 0 no incoming ones: that makes none of them
    mute or deaf. What a mute head computes still reaches the MLPs and the output, which are not gated.

    Args:
        hard: A of mode hard, [n, N, N].
        num_heads: H.
    """
    ever = (hard > 0).any(0)  # [N, N]
    layer = torch.arange(len(ever)) // num_heads
    mute = ~ever.any(1) & (layer < layer[-1])
    deaf = ~ever.any(0) & (layer > 0)
    return mute, deaf


def by_layer_pair(adjacency: Tensor, num_heads: int) -> Tensor:
    """Mean gate from each layer (row) to each other (column), [..., L, L] from [..., N, N]; NaN where none is valid."""
    blocks = adjacency.unflatten(-1, (-1, num_heads)).unflatten(-3, (-1, num_heads))  # [..., L, H, L, H]
    num_layers = blocks.shape[-2]
    return blocks.mean((-3, -1)).masked_fill(~dag_mask(num_layers, 1), torch.nan)


def jaccard_distances(one: Tensor, other: Tensor) -> Tensor:
    """Weighted Jaccard distance of every wiring of a set to every one of another, float64 [n, m].

    1 - sum min(a, b) / sum max(a, b) (Ruzicka). For hard gates that is the Jaccard distance of two sets of edges:
    the edges that one of them has alone, among those that at least one has. Two wirings without any edge are equal.

    Args:
        one: gates between 0 and 1, [n, E].
        other: [m, E].
    """
    one, other = one.double(), other.double()
    apart = torch.cdist(one, other, p=1)  # sum |a - b| = sum max - sum min
    together = one.sum(1)[:, None] + other.sum(1)[None, :]  # sum max + sum min
    return (2 * apart / (together + apart)).nan_to_num(nan=0.0)


def variation(gates: Tensor) -> dict[str, float | int]:
    """How much wirings differ from text to text, by measures that are 0 if they are all the same; and entropy.

    Args:
        gates: soft or hard, [n, E], n > 1.

    Returns:
        gate_variance: variance of a gate over texts, mean over gates.
        distance_mean, distance_variance: of `jaccard_distances` over all pairs of texts.
        entropy_bits: of a gate in one text, mean over gates and texts; see `gate_entropy`.
        information_bits: what a gate's being open or shut tells about the text, mean over gates: the entropy of its
            mean minus its mean entropy.
        effective_rank: see `effective_rank`.
        distinct: different wirings among the n, 1 if they are all the same.
    """
    gates = gates.double()
    first, second = torch.triu_indices(len(gates), len(gates), 1)
    distances = jaccard_distances(gates, gates)[first, second]
    entropy = gate_entropy(gates)
    information = gate_entropy(gates.mean(0)) - entropy.mean(0)
    return {
        "gate_variance": float(gates.var(0, correction=0).mean()),
        "distance_mean": float(distances.mean()),
        "distance_variance": float(distances.var(correction=0)),
        "entropy_bits": float(entropy.mean()),
        "information_bits": max(0.0, float(information.mean())),  # it is never negative but for rounding
        "effective_rank": effective_rank(gates),
        "distinct": len(gates.unique(dim=0)),
    }


def effective_rank(gates: Tensor) -> float:
    """Along how many directions wirings differ: exp of the entropy of the singular values' shares (Roy, Vetterli 2007).

    Args:
        gates: [n, E]. The mean over texts is taken out first, so the rank is 0 where they do not differ at all, and at
            most n - 1.
    """
    gates = gates.double()
    centred = gates - gates.mean(0)
    squares = torch.linalg.eigvalsh(centred @ centred.T)  # of the singular values; n is much smaller than E
    squares = squares[squares > len(gates) * ROUNDING * gates.square().sum()]
    shares = squares.sqrt() / squares.sqrt().sum()
    return float(torch.special.entr(shares).sum().exp()) if len(squares) else 0.0


def _mean(values: Tensor) -> float:
    """The mean over texts, [n]."""
    return float(values.double().mean())
