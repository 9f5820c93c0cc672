"""How the NLL of a base depends on its wiring near A = 1: gradients there, edges removed, and gates optimised directly.

Gates outside a predictor's reach are the question here, so there is no predictor: one wiring is given to every text, or
each text gets the best that descent finds for it.

    n windows   B batch   T tokens   L layers   H heads   N nodes   E valid entries
"""

from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.analysis.nll import batches, window_nll
from dynaroute.analysis.statistics import Interval, mean_vector_test, paired_difference
from dynaroute.config.dagformer import Analysis
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.shards import Windows
from dynaroute.data.tokens.windows import Subset, WindowSet
from dynaroute.training.nll import token_nll


def gate_gradients(graph: DagForward, windows: WindowSet) -> Tensor:
    """The gradient of every window's mean NLL with respect to every gate, at A = 1; float32 [n, E] on the CPU."""
    valid = dag_mask(graph.num_layers, graph.num_heads, graph.base.device)
    gradients = []
    for indices in tqdm(list(batches(len(windows))), desc="gradients", unit="batch", disable=None):
        tokens, targets = _batch(graph, windows, indices)
        adjacency = valid.float().repeat(len(tokens), 1, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(_window_nll(graph, tokens, targets, adjacency).sum(), adjacency)
        gradients.append(gradient[:, valid].cpu())
    return torch.cat(gradients)


def flatness(gradients: np.ndarray, documents: np.ndarray, permutations: int, seed: int) -> dict[str, Any]:
    """Whether NLL has a slope at A = 1: how the mean gradient compares with chance.

    Args:
        gradients: [n, E].
        documents: [n], the document of each window.
        permutations: of the test of all gates together.
        seed: of those.

    Returns:
        n, documents, gates; size, the mean absolute gradient of a gate in a window; size_of_mean, that of a gate's
        mean over windows, with size_by_chance and p, see `mean_vector_test`.
    """
    together = mean_vector_test(gradients, documents, permutations, seed)
    return {
        "n": len(gradients),
        "documents": len(set(documents.tolist())),
        "gates": gradients.shape[1],
        "size": float(np.abs(gradients).mean()),
        "size_of_mean": together.observed,
        "size_by_chance": together.chance,
        "p": together.p,
    }


def closing_all(graph: DagForward, windows: WindowSet, documents: np.ndarray) -> dict[str, float | int]:
    """What all edges together are worth: NLL with every gate at 0 minus that at A = 1, and both means."""
    opened = dag_mask(graph.num_layers, graph.num_heads).float()
    closed, whole = window_nll(graph, windows, torch.zeros_like(opened)), window_nll(graph, windows, opened)
    means = {"nll_closed": float(closed.mean()), "nll_open": float(whole.mean())}
    return _columns(paired_difference(closed, whole, documents)) | means


def removal_orders(mean_gradient: np.ndarray, random: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Orders in which to remove the E edges, most dispensable first; a list of permutations by the kind of order.

    random: drawn; least_gradient: by the gradient's absolute value; expected_gain: by how much removing an edge lowers
    NLL to first order, which is its gradient.
    """
    rng = np.random.default_rng(seed)
    return {
        "random": [rng.permutation(len(mean_gradient)) for _ in range(random)],
        "least_gradient": [np.argsort(np.abs(mean_gradient), kind="stable")],
        "expected_gain": [np.argsort(-mean_gradient, kind="stable")],
    }


def without_edges(num_layers: int, num_heads: int, edges: np.ndarray) -> Tensor:
    """A = 1 without some edges, [N, N]; edges are numbered along the valid entries, in the order of a mask's."""
    valid = dag_mask(num_layers, num_heads)
    gates = torch.ones(int(valid.sum()))
    gates[torch.from_numpy(edges)] = 0
    adjacency = torch.zeros(valid.shape)
    adjacency[valid] = gates
    return adjacency


def removals(
    graph: DagForward,
    windows: WindowSet,
    documents: np.ndarray,
    mean_gradient: np.ndarray,
    analysis: Analysis,
    seed: int,
) -> list[dict[str, Any]]:
    """NLL without edges, by order and fraction, minus that at A = 1.

    Args:
        graph: the base.
        windows: n of them.
        documents: [n], the document of each window.
        mean_gradient: [E], from other windows; the orders of removal follow from it.
        analysis: fractions, and the number of random orders.
        seed: of those.

    Returns:
        A row for each order and fraction: mean, low, high and documents of `paired_difference`; draws, over which a
        random order is averaged; and over_random, low_over_random and high_over_random, the difference to the random
        order at the same fraction.
    """
    shape = graph.num_layers, graph.num_heads
    whole, rows, random = window_nll(graph, windows, dag_mask(*shape).float()), [], {}  # random: NLL [n] by fraction
    orders = removal_orders(mean_gradient, analysis.random_removals, seed)
    for order, fraction in tqdm(list(product(orders, analysis.removal_fractions)), desc="removals", disable=None):
        wirings = [without_edges(*shape, one[: round(fraction * len(one))]) for one in orders[order]]
        nll = np.mean([window_nll(graph, windows, adjacency) for adjacency in wirings], axis=0)
        apart = paired_difference(nll, random.setdefault(fraction, nll), documents)
        row = {"order": order, "fraction": fraction, "draws": len(wirings)}
        row |= _columns(paired_difference(nll, whole, documents))
        rows.append(row | {"over_random": apart.mean, "low_over_random": apart.low, "high_over_random": apart.high})
    return rows


def group_removals(
    graph: DagForward, windows: WindowSet, documents: np.ndarray, mean_gradient: np.ndarray, number: int
) -> list[dict[str, Any]]:
    """NLL without groups of edges, minus that at A = 1: all edges from one layer to another, or all that leave a head.

    Args:
        graph: the base.
        windows: n of them.
        documents: [n], the document of each window.
        mean_gradient: [E], from other windows. To first order, NLL falls by the sum of a group's.
        number: the groups of each kind to remove that promise most, and as many that promise least.

    Returns:
        A row for each group: kind (layers or head); first and second, its source and target layer, or its layer and
        head; promising, whether it is of those that promise most; expected, the change of NLL to first order; and
        mean, low, high and documents of `paired_difference`.
    """
    L, H = graph.num_layers, graph.num_heads
    source, target = np.nonzero(dag_mask(L, H).numpy())  # nodes, in the order of valid entries
    keys = {"layers": np.stack([source // H, target // H], 1), "head": np.stack([source // H, source % H], 1)}
    chosen = []
    for kind, key in keys.items():
        groups, group_of = np.unique(key, axis=0, return_inverse=True)
        expected = -np.bincount(group_of.ravel(), mean_gradient)
        order = np.argsort(expected, kind="stable")
        ends = min(number, len(order) // 2)
        for own in [*order[:ends], *order[len(order) - ends :]]:
            row = {"kind": kind, "first": int(groups[own][0]), "second": int(groups[own][1])}
            row |= {"promising": bool(own in order[:ends]), "expected": float(expected[own])}
            chosen.append((row, np.flatnonzero(group_of.ravel() == own)))
    whole, rows = window_nll(graph, windows, dag_mask(L, H).float()), []
    for row, edges in tqdm(chosen, desc="groups of edges", disable=None):
        nll = window_nll(graph, windows, without_edges(L, H, edges))
        rows.append(row | _columns(paired_difference(nll, whole, documents)))
    return rows


def _columns(found: Interval) -> dict[str, float | int]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "documents": found.n}


def optimise_gates(graph: DagForward, windows: WindowSet, steps: int, lr: float) -> Tensor:
    """The gates that descent finds for each window by itself, soft, float32 [n, N, N] on the CPU.

    Adam on A itself, from A = 1, on the window's own mean NLL; after every step gates are put back into [0, 1].
    """
    valid = dag_mask(graph.num_layers, graph.num_heads, graph.base.device)
    found, parts = [], list(batches(len(windows)))
    with tqdm(total=steps * len(parts), desc="oracle", unit="step", disable=None) as progress:
        for indices in parts:
            tokens, targets = _batch(graph, windows, indices)
            adjacency = valid.float().repeat(len(tokens), 1, 1).requires_grad_()
            optimizer = torch.optim.Adam([adjacency], lr=lr)
            for _ in range(steps):
                optimizer.zero_grad()
                _window_nll(graph, tokens, targets, adjacency).sum().backward()  # each gradient is of one window alone
                optimizer.step()
                with torch.no_grad():
                    adjacency.clamp_(0, 1)
                progress.update()
            found.append(adjacency.detach().where(valid, 0).cpu())
    return torch.cat(found)


def score_oracle(
    graph: DagForward, windows: Windows, own: list[int], documents: np.ndarray, gates: Tensor
) -> dict[str, dict[str, float | int]]:
    """NLL of gates optimised on a window each, minus that at A = 1, on three texts.

    Args:
        graph: the base.
        windows: all of a split.
        own: the n windows that the gates were optimised on; each is followed by a window of the same document.
        documents: the document of every window of the split.
        gates: [n, N, N].

    Returns:
        By text (same, the window itself; next, the one after it; other, one of another document): mean, low, high and
        documents of the interval.
    """
    texts = {"same": own, "next": [window + 1 for window in own]}
    texts["other"] = [own[index] for index in other_texts(documents[own])]
    opened, found = dag_mask(graph.num_layers, graph.num_heads).float(), {}
    for text, indices in texts.items():
        scored = Subset(windows, indices)
        nll = (window_nll(graph, scored, adjacency) for adjacency in (gates, opened))
        found[text] = _columns(paired_difference(*nll, documents[own]))
    return found


def other_texts(documents: np.ndarray) -> list[int]:
    """For each of n windows one of the n that is of another document, far off in their order where that can be.

    Where one document has more than half of the windows, its windows share the others evenly as partners.

    Args:
        documents: [n], the document of each; at least two different ones.
    """
    partners = []
    for index, document in enumerate(documents):
        others = np.flatnonzero(documents != document)
        partners.append(int(others[(index - len(documents) // 2) % len(others)]))
    return partners


def _batch(graph: DagForward, windows: WindowSet, indices: range) -> tuple[Tensor, Tensor]:
    tokens, targets = windows.batch(indices)
    return tokens.to(graph.base.device), targets.to(graph.base.device)


def _window_nll(graph: DagForward, tokens: Tensor, targets: Tensor, adjacency: Tensor) -> Tensor:
    """Mean NLL of each window, [B]."""
    return token_nll(graph(tokens, adjacency), targets).sum(1) / targets.shape[1]
