"""How the NLL of a base depends on its wiring near A = 1: gradients there, edges removed, and gates optimised directly.

Gates outside a predictor's reach are the question here, so there is no predictor: one wiring is given to every text, or
each text gets the best that descent finds for it.

    n windows   B batch   T tokens   L layers   H heads   N nodes   E valid entries
"""

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.analysis.nll import WindowSet, sequence_nll, token_nll, wired_nll
from dynaroute.analysis.statistics import SIGNIFICANT, benjamini_hochberg, group_means, mean_vector_test, t_test_p
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.shards import IGNORED_TARGET


def gate_gradients(graph: DagForward, windows: WindowSet, batch_size: int) -> Tensor:
    """The gradient of every window's mean NLL with respect to every gate, at A = 1; float32 [n, E] on the CPU."""
    valid = dag_mask(graph.num_layers, graph.num_heads, graph.base.device)
    gradients = []
    for start in tqdm(range(0, len(windows), batch_size), desc="gradients", unit="batch", disable=None):
        tokens, targets = _batch(graph, windows, range(start, min(start + batch_size, len(windows))))
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
        p: of Student's t test that this mean is 0, corrected by Benjamini and Hochberg over the gates.
        spread, size: standard deviation and mean absolute value over windows.
        sign_consistency: |positive - negative| / n: 1 if all windows agree, see `chance_consistency`.

    Raises:
        DynarouteError: there are fewer than two documents.
    """
    by_document = group_means(gradients, documents)
    return {
        "mean": by_document.mean(0),
        "p": benjamini_hochberg(t_test_p(by_document)),
        "spread": gradients.std(0, ddof=1),
        "size": np.abs(gradients).mean(0),
        "sign_consistency": np.abs(np.sign(gradients).mean(0)),
    }


def chance_consistency(n: int) -> float:
    """The expected sign consistency of n signs that are thrown like coins: E|sum| / n of n numbers of +1 or -1."""
    return comb(n - 1, (n - 1) // 2) / 2 ** (n - 1)


def flatness(gradients: np.ndarray, documents: np.ndarray, permutations: int, seed: int) -> dict[str, Any]:
    """Whether NLL is shown not to be flat at A = 1: whether its mean gradient can be told from 0.

    Args:
        gradients: [n, E].
        documents: [n], which document each window is of.
        permutations: of the test of all gates together.
        seed: of those.

    Returns:
        n, documents, gates; size, the mean absolute gradient of a gate in a window; size_of_mean, that of a gate's
        mean over windows, with size_by_chance and p, see `mean_vector_test`; helpful, harmful: shares of gates whose
        own mean over documents is below or above 0 by a corrected p below SIGNIFICANT: opening them lowers NLL, or
        closing them does; sign_consistency and sign_consistency_by_chance; slopes, whether the test of all gates
        together finds a mean gradient. That it does not is no proof that there is none.
    """
    found = describe_gradients(gradients, documents)
    certain = found["p"] < SIGNIFICANT
    together = mean_vector_test(gradients, documents, permutations, seed)
    return {
        "n": len(gradients),
        "documents": len(set(documents.tolist())),
        "gates": gradients.shape[1],
        "size": float(found["size"].mean()),
        "size_of_mean": together.observed,
        "size_by_chance": together.chance,
        "p": together.p,
        "helpful": float((certain & (found["mean"] < 0)).mean()),
        "harmful": float((certain & (found["mean"] > 0)).mean()),
        "sign_consistency": float(found["sign_consistency"].mean()),
        "sign_consistency_by_chance": chance_consistency(len(gradients)),
        "slopes": together.p < SIGNIFICANT,
    }


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


def nll_of_wirings(
    graph: DagForward, windows: WindowSet, wirings: Sequence[Tensor], batch_size: int, name: str
) -> np.ndarray:
    """NLL in nats per token of every window under each of some wirings, float64 [wirings, n].

    Args:
        graph: the base.
        windows: n of them.
        wirings: [N, N] each.
        batch_size: changes results in the last bits, as float sums do.
        name: of the progress bar.
    """
    _, targets = windows.batch(range(len(windows)))
    found = []
    for adjacency in tqdm(wirings, desc=name, unit="wiring", disable=None):
        sums, counts = sequence_nll(
            wired_nll(graph, windows, adjacency.expand(len(windows), -1, -1), batch_size), targets
        )
        found.append((sums / counts).numpy())
    return np.stack(found)


def optimise_gates(graph: DagForward, windows: WindowSet, steps: int, lr: float, batch_size: int) -> Tensor:
    """The gates that descent finds for each window by itself, soft, float32 [n, N, N] on the CPU.

    Adam on A itself, from A = 1, on the window's own mean NLL; after every step gates are put back into [0, 1].
    """
    valid = dag_mask(graph.num_layers, graph.num_heads, graph.base.device)
    found = []
    batches = [range(start, min(start + batch_size, len(windows))) for start in range(0, len(windows), batch_size)]
    with tqdm(total=steps * len(batches), desc="oracle", unit="step", disable=None) as progress:
        for indices in batches:
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


def _batch(graph: DagForward, windows: WindowSet, indices: range) -> tuple[Tensor, Tensor]:
    tokens, targets = windows.batch(indices)
    return tokens.to(graph.base.device), targets.to(graph.base.device)


def _window_nll(graph: DagForward, tokens: Tensor, targets: Tensor, adjacency: Tensor) -> Tensor:
    """Mean NLL of each window, [B]."""
    return token_nll(graph(tokens, adjacency), targets).sum(1) / (targets != IGNORED_TARGET).sum(1)
