"""How the NLL of a base depends on its wiring near A = 1: gradients there, edges removed, and gates optimised directly.

Gates outside a predictor's reach are the question here, so there is no predictor: one wiring is given to every text, or
each text gets the best that descent finds for it.

    n windows   B batch   T tokens   L layers   H heads   N nodes   E valid entries
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.analysis.nll import batches, window_nll
from dynaroute.analysis.statistics import Interval, document_means, mean_vector_test, paired_difference
from dynaroute.config.dagformer import Analysis
from dynaroute.dagformer.gates import dag_mask, layer_distance
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


def describe_gradients(gradients: np.ndarray, documents: np.ndarray) -> dict[str, np.ndarray]:
    """What the gradients of each gate are over n windows, [E] each.

    Args:
        gradients: [n, E].
        documents: [n], which document each window is of.

    Returns:
        mean: over documents, of the mean over a document's windows, which are alike: one number for each document.
        spread, size: standard deviation and mean absolute value over windows.
        sign_consistency: |positive - negative| / n: 1 if all windows agree, see `chance_consistency`.

    Raises:
        DynarouteError: there are fewer than two documents.
    """
    return {
        "mean": document_means(gradients, documents).mean(0),
        "spread": gradients.std(0, ddof=1),
        "size": np.abs(gradients).mean(0),
        "sign_consistency": np.abs(np.sign(gradients).mean(0)),
    }


def chance_consistency(n: int) -> float:
    """The expected sign consistency of n signs that are thrown like coins: E|sum| / n of n numbers of +1 or -1."""
    return comb(n - 1, (n - 1) // 2) / 2 ** (n - 1)


def flatness(gradients: np.ndarray, documents: np.ndarray, permutations: int, seed: int) -> dict[str, Any]:
    """Whether NLL has a slope at A = 1: how the mean gradient compares with chance.

    Args:
        gradients: [n, E].
        documents: [n], the document of each window.
        permutations: of the test of all gates together.
        seed: of those.

    Returns:
        n, documents, gates; size, the mean absolute gradient of a gate in a window; size_of_mean, that of a gate's
        mean over windows, with size_by_chance and p, see `mean_vector_test`; sign_consistency and
        sign_consistency_by_chance.
    """
    found = describe_gradients(gradients, documents)
    together = mean_vector_test(gradients, documents, permutations, seed)
    return {
        "n": len(gradients),
        "documents": len(set(documents.tolist())),
        "gates": gradients.shape[1],
        "size": float(found["size"].mean()),
        "size_of_mean": together.observed,
        "size_by_chance": together.chance,
        "p": together.p,
        "sign_consistency": float(found["sign_consistency"].mean()),
        "sign_consistency_by_chance": chance_consistency(len(gradients)),
    }


def gradients_by_layer_pair(graph: DagForward, gradients: np.ndarray, documents: np.ndarray) -> list[dict[str, Any]]:
    """A row for each layer pair: source, target, gates, and means over its gates of `describe_gradients`."""
    found = describe_gradients(gradients, documents)
    layer = torch.arange(graph.num_layers * graph.num_heads) // graph.num_heads
    valid = dag_mask(graph.num_layers, graph.num_heads)
    sources, targets = (part.expand(valid.shape)[valid].numpy() for part in (layer[:, None], layer[None, :]))
    rows = []
    for source, target in combinations(range(graph.num_layers), 2):
        own = (sources == source) & (targets == target)
        row = {"source": source, "target": target, "gates": int(own.sum())}
        rows.append(row | {key: float(values[own].mean()) for key, values in found.items()})
    return rows


def adjacent_minus_skip(graph: DagForward, gradients: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Mean size of gradients of gates between adjacent layers, of those that skip layers, and their difference."""
    adjacent = (layer_distance(graph.num_layers, graph.num_heads) == 1)[dag_mask(graph.num_layers, graph.num_heads)]
    sizes = [np.abs(gradients[:, part]).mean(1) for part in (adjacent.numpy(), ~adjacent.numpy())]
    means = {"adjacent": float(sizes[0].mean()), "skip": float(sizes[1].mean())}
    return paired_difference(*sizes, documents)._asdict() | means


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


def without_layer_pair(num_layers: int, num_heads: int, source: int, target: int) -> Tensor:
    """A = 1 without what one layer sends to another, [N, N]."""
    adjacency = dag_mask(num_layers, num_heads).float()
    adjacency.view(num_layers, num_heads, num_layers, num_heads)[source, :, target] = 0
    return adjacency


def without_head(num_layers: int, num_heads: int, node: int) -> Tensor:
    """A = 1 without all edges into and out of a head, [N, N]. It still adds to MLPs and output, which are not gated."""
    adjacency = dag_mask(num_layers, num_heads).float()
    adjacency[node], adjacency[:, node] = 0, 0
    return adjacency


def removals(
    graph: DagForward,
    windows: WindowSet,
    documents: np.ndarray,
    mean_gradient: np.ndarray,
    analysis: Analysis,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """NLL minus that at A = 1, without edges by order and fraction, without each layer pair, and without each head.

    Args:
        graph: the base.
        windows: n of them.
        documents: [n], the document of each window.
        mean_gradient: [E], from other windows, by which orders of removal go.
        analysis: fractions, and the number of random orders.
        seed: of those.

    Returns:
        Rows by kind: removal, layer_pairs, heads. Each has mean, low, high and documents of `paired_difference`; those
        of removal also draws, whose mean a random order is, and over_random, low_over_random and high_over_random, the
        difference to the random order at the same fraction.
    """
    layers, heads = graph.num_layers, graph.num_heads

    def scored(name: str, wirings: Sequence[Tensor]) -> np.ndarray:
        """NLL of every window under each of some wirings, [wirings, n]."""
        bar = tqdm(wirings, desc=name, unit="wiring", disable=None)
        return np.stack([window_nll(graph, windows, adjacency) for adjacency in bar])

    def row(names: dict[str, Any], nll: np.ndarray) -> dict[str, Any]:
        return names | _columns(paired_difference(nll, whole, documents))

    (whole,) = scored("no edge removed", [dag_mask(layers, heads).float()])
    orders = removal_orders(mean_gradient, analysis.random_removals, seed)
    by_order, random = [], {}  # NLL [n] of the random order by fraction
    for order, drawn in orders.items():
        for fraction in analysis.removal_fractions:
            wirings = [without_edges(layers, heads, one[: round(fraction * len(one))]) for one in drawn]
            nll = scored(f"{order} {fraction:g}", wirings).mean(0)
            names = {"order": order, "fraction": fraction, "draws": len(drawn)}
            apart = paired_difference(nll, random.setdefault(fraction, nll), documents)
            over = {"over_random": apart.mean, "low_over_random": apart.low, "high_over_random": apart.high}
            by_order.append(row(names, nll) | over)
    pairs = list(combinations(range(layers), 2))
    cut = scored("layer pairs", [without_layer_pair(layers, heads, *pair) for pair in pairs])
    alone = scored("heads", [without_head(layers, heads, node) for node in range(layers * heads)])
    return {
        "removal": by_order,
        "layer_pairs": [row({"source": s, "target": t}, nll) for (s, t), nll in zip(pairs, cut, strict=True)],
        "heads": [row({"layer": node // heads, "head": node % heads}, nll) for node, nll in enumerate(alone)],
    }


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
) -> list[dict[str, Any]]:
    """Gates optimised on a window each, scored on it, on the window after it, and on one of another document.

    Args:
        graph: the base.
        windows: all of a split.
        own: the n windows that the gates were optimised on; each is followed by a window of the same document.
        documents: the document of every window of the split.
        gates: [n, N, N].

    Returns:
        A row for each text (same, next, other) and window: document, scored_window, nll_oracle, nll_baseline.
    """
    others = [own[index] for index in other_texts(documents[own])]
    texts, rows = {"same": own, "next": [window + 1 for window in own], "other": others}, []
    for text, indices in texts.items():
        scored = Subset(windows, indices)
        oracle = window_nll(graph, scored, gates)
        baseline = window_nll(graph, scored, dag_mask(graph.num_layers, graph.num_heads).float())
        for index, window in enumerate(own):
            row = {"window": window, "document": int(documents[window]), "text": text, "scored_window": indices[index]}
            rows.append(row | {"nll_oracle": float(oracle[index]), "nll_baseline": float(baseline[index])})
    return rows


def summarise_oracle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """NLL of optimised gates minus that at A = 1, on each text: mean, low, high and documents of the interval."""
    found = {}
    for text in ("same", "next", "other"):
        own = [row for row in rows if row["text"] == text]
        columns = (np.array([row[key] for row in own]) for key in ("nll_oracle", "nll_baseline", "document"))
        found[text] = _columns(paired_difference(*columns))
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
