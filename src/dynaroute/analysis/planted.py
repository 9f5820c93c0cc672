"""How close methods come on the planted base, where the best wiring of each source's texts is known.

n windows   N nodes   E valid entries   C sources
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynaroute.analysis.domains import Domains
from dynaroute.analysis.nll import WindowSet, mean_nll, position_nll
from dynaroute.analysis.sensitivity import gate_gradients
from dynaroute.analysis.statistics import Interval, paired_difference
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward


def known_nll(
    graph: DagForward, windows: WindowSet, masks: Tensor, sources: np.ndarray, first: Mapping[str, int]
) -> dict[str, dict[str, np.ndarray]]:
    """NLL of every window under wirings that need no training, [n] by protocol and wiring.

    Args:
        graph: the planted base.
        windows: n of them.
        masks: [C, N, N], the planted wirings.
        sources: [n] int, the source of each window.
        first: by protocol, the first position that counts.

    Returns:
        By protocol: own, the mask of the window's source; other, those of the other sources, averaged; mean, the mean
        of all masks, the obvious single wiring; one and zero, all gates open and closed.
    """
    masks, C = masks.float(), len(masks)
    own = torch.from_numpy(sources)
    wirings = {"own": masks[own], "mean": masks.mean(0)}
    wirings["one"] = dag_mask(graph.num_layers, graph.num_heads).float()
    wirings["zero"] = torch.zeros_like(wirings["one"])
    nll = {key: position_nll(graph, windows, adjacency) for key, adjacency in wirings.items()}
    others = [position_nll(graph, windows, masks[(own + turn) % C]) for turn in range(1, C)]
    nll["other"] = torch.stack(others).mean(0)
    return {
        protocol: {key: mean_nll(values, start) for key, values in nll.items()} for protocol, start in first.items()
    }


def share(part: np.ndarray, whole: np.ndarray, documents: np.ndarray) -> Interval:
    """The ratio of two means over n windows with its 95 % interval by document (delta method).

    Args:
        part, whole: [n] each.
        documents: [n], the document of each window.
    """
    ratio, scale = part.mean() / whole.mean(), whole.mean()
    around = paired_difference(part / scale, ratio * whole / scale, documents)  # its mean is 0
    return Interval(float(ratio), float(ratio + around.low), float(ratio + around.high), around.n)


def escape(nll: np.ndarray, known: Mapping[str, np.ndarray], documents: np.ndarray) -> Interval:
    """(NLL(A = 1) - NLL) / (NLL(A = 1) - NLL(own mask)): one wiring for all texts can nearly reach 1."""
    return share(known["one"] - nll, known["one"] - known["own"], documents)


def context(nll: np.ndarray, control: np.ndarray, known: Mapping[str, np.ndarray], documents: np.ndarray) -> Interval:
    """(NLL(control) - NLL) / (NLL(control) - NLL(own mask)), where the control learned one wiring for all texts."""
    return share(control - nll, control - known["own"], documents)


def recovery(
    gates: Tensor, masks: Tensor, sources: np.ndarray, documents: np.ndarray, permutations: int, seed: int
) -> dict[str, Any]:
    """Whether wirings are the planted ones: X2 with a known answer.

    Args:
        gates: [n, E] of 0 and 1.
        masks: [C, E] bool.
        sources: [n] int.
        documents: [n], the document of each window, which is of one source.
        permutations, seed: of the test.

    Returns:
        agreement, the share of gates that are open or closed as in the own mask; probe, whether a linear probe tells
        the source from the gates (a test, see `Domains.probe`).
    """
    agreement = (gates == masks[torch.from_numpy(sources)]).double().mean()
    _, first, index = np.unique(documents, return_index=True, return_inverse=True)
    _, labels = np.unique(sources[first], return_inverse=True)
    probe = Domains(index, labels, permutations, seed).probe(gates.numpy())
    return {"agreement": float(agreement), "probe": probe._asdict()}


def gradient_signs(graph: DagForward, windows: WindowSet, masks: Tensor, sources: np.ndarray) -> dict[str, Any]:
    """Whether gradients at A = 1 point to the planted wiring: X3 with a known answer.

    Closing an edge lowers NLL to first order where its gradient is positive. So the mean gradient over a source's
    windows should be higher for the edges that its mask closes.

    Returns:
        A mean over sources: closed_positive and open_positive, the shares of edges with a positive mean gradient among
        those that the mask closes and opens; ranked, the chance that the gradient of a closed edge is above that of an
        open one (0.5 if gradients know nothing).
    """
    valid = dag_mask(graph.num_layers, graph.num_heads)
    gradients, found = gate_gradients(graph, windows).double().numpy(), []
    for source in np.unique(sources):
        mean, opened = gradients[sources == source].mean(0), masks[source][valid].numpy()
        ranks = np.argsort(np.argsort(mean))[~opened] + 1
        closed = len(ranks)
        above = ranks.sum() - closed * (closed + 1) / 2  # Mann and Whitney's U
        found.append(((mean[~opened] > 0).mean(), (mean[opened] > 0).mean(), above / (closed * opened.sum())))
    return dict(zip(("closed_positive", "open_positive", "ranked"), np.mean(found, 0).tolist(), strict=True))
