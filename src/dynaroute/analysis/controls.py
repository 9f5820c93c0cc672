"""Wirings that were not predicted from what is scored: of equal density, of other texts, and of the prefix.

n windows   N nodes
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.analysis.nll import Wiring, window_nll
from dynaroute.analysis.statistics import paired_difference
from dynaroute.config.dagformer import MODES
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.windows import WindowSet

NLL = Mapping[str, Mapping[str, np.ndarray]]  # by protocol and mode (also baseline), [n] each


def equally_dense(hard: Tensor, valid: Tensor, seed: int, order: np.ndarray | None = None) -> Tensor:
    """Wirings that close as many edges as given ones, each of its own number: a control of which edges they close.

    Args:
        hard: [n, N, N] of 0 and 1.
        valid: [N, N] bool, with E entries.
        seed: of random edges, others for each of the n.
        order: [E], the edges to close first to last; None: random ones.

    Returns:
        [n, N, N], float32.
    """
    found, rng = torch.zeros(hard.shape), np.random.default_rng(seed)
    for wiring, own in zip(found, hard[:, valid], strict=True):
        closed = (rng.permutation(len(own)) if order is None else order)[: int((own == 0).sum())]
        gates = torch.ones(len(own))
        gates[torch.from_numpy(closed.copy())] = 0
        wiring[valid] = gates
    return found


def shifts(n: int, number: int) -> list[int]:
    """By how much to shift n texts so that each meets `number` < n others, as far apart as can be.

    They are at least one step apart, after 0 and before n: so they differ, and no text meets itself.
    """
    return [n * (index + 1) // (number + 1) for index in range(number)]


def swapped_nll(
    graph: DagForward,
    windows: WindowSet,
    wirings: Mapping[str, Wiring],
    evaluated: NLL,
    first: Mapping[str, int],
    number: int,
) -> dict[str, np.ndarray]:
    """Soft NLL of every window under the wirings of `number` other texts, on average; [n] by protocol.

    Args:
        graph: the base.
        windows: n of them.
        wirings: of these windows, by protocol.
        evaluated: their NLL under their own wirings.
        first: by protocol, the first position that counts.
        number: other texts for each.
    """
    found = {}
    with tqdm(total=len(wirings) * number, desc="swaps", unit="wiring", disable=None) as progress:
        for protocol, wiring in wirings.items():
            others = []
            for shift in shifts(len(windows), number):
                other = wiring.soft.roll(shift, 0)
                same = torch.equal(other, wiring.soft)  # one wiring for all texts
                own = evaluated[protocol]["soft"]
                others.append(own if same else window_nll(graph, windows, other, first[protocol]))
                progress.update()
            found[protocol] = np.mean(others, axis=0)
    return found


def reading(
    graph: DagForward,
    windows: WindowSet,
    wirings: Mapping[str, Wiring],
    evaluated: NLL,
    documents: np.ndarray,
    first: int,
) -> dict[str, Any]:
    """How much of a gain is that the encoder has read what is scored: NLL after the prefix, read and not read.

    Args:
        graph, windows, wirings, evaluated: see `swapped_nll`.
        documents: [n], the document of each window.
        first: the first position after the prefix that counts.

    Returns:
        By mode: read and not_read, NLL minus the baseline's, and read_minus_not_read; intervals by document.
    """
    not_read, found = evaluated["prefix"], {}
    for mode in MODES:
        adjacency = getattr(wirings["window"], mode)
        same = torch.equal(adjacency, getattr(wirings["prefix"], mode))  # one wiring for all texts
        read = not_read[mode] if same else window_nll(graph, windows, adjacency, first)
        pairs = {"read": (read, not_read["baseline"]), "not_read": (not_read[mode], not_read["baseline"])}
        pairs["read_minus_not_read"] = read, not_read[mode]
        found[mode] = {key: paired_difference(*pair, documents)._asdict() for key, pair in pairs.items()}
    return found
