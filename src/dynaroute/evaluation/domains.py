"""Whether wirings differ by where a text is from. Domains are the sources of a corpus.

Windows of one document are alike whatever its source. So documents are the unit here: pairs of windows of one document
do not count, a probe is tested on documents that it was not fitted on, and permutations deal out the sources of whole
documents anew.

n windows   m documents   E features, such as the gates of a wiring   P layer pairs   C sources
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dynaroute.data.shards import TokenShards
from dynaroute.evaluation.statistics import PermutationTest, permutation_test

RIDGE = 0.1  # of the linear probe, relative to the mean square of a window's centred features
MAX_SOURCES = 64  # whose pairs are all compared; more are rather labels of documents than domains
ROUNDING = 1e-14  # relative: features that vary less, by their squares, do not vary


class DomainWindows(NamedTuple):
    """The same number of windows from every source, each of them wholly within one document."""

    windows: list[int]  # [n] indices among all whole windows of the split
    documents: np.ndarray  # [n] int64, 0 .. m-1: which document each is of
    labels: np.ndarray  # [m] int64: the source of each document, an index into `sources`
    sources: list[str]  # C names; sources with windows of at least two documents


class Domains:
    """Tests of what the sources of n windows tell about them; see `DomainWindows` for documents and labels."""

    def __init__(self, documents: np.ndarray, labels: np.ndarray, permutations: int, seed: int) -> None:
        self.documents, self.labels, self.permutations, self.seed = documents, labels, permutations, seed
        self.num_sources = int(labels.max()) + 1

    def separation(self, distances: np.ndarray) -> PermutationTest:
        """Mean distance of windows of different sources, less that of the same one; pairs of two documents only.

        Args:
            distances: [n, n].
        """
        member = np.eye(len(self.labels))[self.documents]  # [n, m]
        sums, pairs = member.T @ distances @ member, member.T.sum(1, keepdims=True) * member.sum(0)
        others = ~np.eye(len(self.labels), dtype=bool)

        def statistic(labels: np.ndarray) -> float:
            same = labels[:, None] == labels
            within, between = same & others, ~same
            return sums[between].sum() / pairs[between].sum() - sums[within].sum() / pairs[within].sum()

        return self._test(statistic)

    def mean_distances(self, distances: np.ndarray) -> np.ndarray:
        """Mean distance from each source to each, [C, C]; pairs of two documents only.

        Args:
            distances: [n, n].
        """
        source, different = self.labels[self.documents], self.documents[:, None] != self.documents
        means = np.empty((self.num_sources, self.num_sources))
        for one in range(self.num_sources):
            for other in range(self.num_sources):
                pairs = (source[:, None] == one) & (source == other) & different
                means[one, other] = distances[pairs].mean()
        return means

    def probe(self, features: np.ndarray) -> PermutationTest:
        """The balanced accuracy of a linear probe of the source, fitted on all documents but the window's own.

        Ridge regression of the sources' indicators on centred features; the largest answer wins, and of k equal ones
        each is right for 1/k. Accuracy is the mean over sources of the mean over their documents, so a probe that
        answers the same for every window is right for exactly one in C. In the fit, too, documents of a source weigh
        the same, however many windows they have, and so do sources: permutations change the number of windows of a
        source, but not that of its documents, and only what they leave as it is may count.

        Args:
            features: [n, E].
        """
        answer = leave_one_group_out(features, self.documents)  # [n, n]
        member = np.eye(len(self.labels))[self.documents]  # [n, m]
        mean = member.T / member.sum(0)[:, None]  # [m, n], over the windows of a document

        def statistic(labels: np.ndarray) -> float:
            share = np.eye(self.num_sources)[labels] / np.bincount(labels)  # [m, C], of a document in its source
            scores = answer @ share[self.documents]  # [n, C]
            largest = scores == scores.max(1, keepdims=True)
            right = mean @ (largest / largest.sum(1, keepdims=True))  # [m, C]
            return float((right * share).sum() / self.num_sources)

        return self._test(statistic)

    def explained(self, values: np.ndarray) -> PermutationTest:
        """The share of the variance of each column of [n, P] that lies between sources (eta squared), a test each."""
        centred = values - values.mean(0)
        total = np.square(centred).sum(0)
        varies = total > ROUNDING * np.square(values).sum(0)
        sums = np.eye(len(self.labels))[self.documents].T @ centred  # [m, P]
        sizes = np.bincount(self.documents)

        def statistic(labels: np.ndarray) -> np.ndarray:
            source = np.eye(self.num_sources)[labels]  # [m, C]
            between = (np.square(source.T @ sums) / (sizes @ source)[:, None]).sum(0)
            return np.divide(between, total, out=np.zeros_like(total), where=varies)

        return self._test(statistic)

    def _test(self, statistic: Callable[[np.ndarray], float | np.ndarray]) -> PermutationTest:
        return permutation_test(statistic, self.labels, self.permutations, self.seed)


def leave_one_group_out(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The matrix [n, n] by which targets [n, C] become what ridge regression says of each row without its own group.

    All groups weigh the same: a row counts for one over the rows of its group, in the mean and in the squared error.
    Exactly what fitting anew without each group gives, by the identity for left-out residuals: with the hat matrix
    S = K (K + ridge I)^-1 of all rows, times the roots of their weights, a group's answers without itself are
    (I - S_gg)^-1 (S_g. y - S_gg y_g).

    Args:
        features: [n, E], centred here; all zero where they do not vary.
        groups: [n] int64.
    """
    features = np.asarray(features, np.float64)
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / sizes[group_of]
    roots = np.sqrt(weights)[:, None]
    centred = roots * (features - np.average(features, axis=0, weights=weights))
    kernel = centred @ centred.T
    scale = np.trace(kernel) / len(sizes)
    if scale <= ROUNDING * np.square(roots * features).sum() / len(sizes):
        return np.zeros_like(kernel)
    hat = np.linalg.solve(kernel + RIDGE * scale * np.eye(len(kernel)), kernel).T
    answer = np.zeros_like(kernel)
    for group in range(len(sizes)):
        own = group_of == group
        others = hat[own].copy()
        others[:, own] = 0
        answer[own] = np.linalg.solve(np.eye(own.sum()) - hat[np.ix_(own, own)], others)
    return answer * roots.T / roots


def domain_windows(shards: TokenShards, seq_len: int, most: int) -> DomainWindows | None:
    """Draws windows of each source alone, evenly over its documents; as many of each as the poorest source has.

    Args:
        shards: a split.
        seq_len: T, tokens of a window.
        most: windows of one source at most.

    Returns:
        The windows, or None if there are fewer than two sources with windows of at least two documents, or more than
        MAX_SOURCES.
    """
    whole = windows_of_documents(shards, seq_len)
    by_source: dict[int, dict[int, list[int]]] = {}
    for window in np.flatnonzero(whole >= 0).tolist():
        document = int(whole[window])
        by_source.setdefault(int(shards.document_sources[document]), {}).setdefault(document, []).append(window)
    usable = {source: own for source, own in sorted(by_source.items()) if len(own) > 1}
    if not 2 <= len(usable) <= MAX_SOURCES:
        return None
    number = min(most, *(sum(map(len, own.values())) for own in usable.values()))
    windows, documents, labels = [], [], []
    for label, own in enumerate(usable.values()):
        for drawn in evenly(list(own.values()), number):
            if drawn:
                windows += drawn
                documents += [len(labels)] * len(drawn)
                labels.append(label)
    names = [shards.sources[source] for source in usable]
    return DomainWindows(windows, np.array(documents), np.array(labels), names)


def windows_of_documents(shards: TokenShards, seq_len: int) -> np.ndarray:
    """Which document each whole window of T tokens of a split is wholly within, int64 [windows]; -1 where none."""
    first = np.arange((shards.num_tokens - 1) // seq_len) * seq_len
    document = np.searchsorted(shards.offsets, first, side="right") - 1
    return np.where(shards.offsets[document + 1] >= first + seq_len, document, -1)


def main_documents(shards: TokenShards, seq_len: int, windows: list[int]) -> np.ndarray:
    """The document that most tokens of each given window are of, int64 [n]."""
    found = []
    for window in windows:
        start, stop = window * seq_len, (window + 1) * seq_len
        first = int(np.searchsorted(shards.offsets, start, side="right")) - 1
        last = int(np.searchsorted(shards.offsets, stop, side="left"))  # one past the last document
        found.append(first + int(np.diff(np.clip(shards.offsets[first : last + 1], start, stop)).argmax()))
    return np.array(found)


def evenly(groups: list[list[int]], number: int) -> list[list[int]]:
    """`number` items in all, as even a number from each group as its size allows, evenly spaced within it.

    There must be that many. Where there are more groups than items, the groups that give one are evenly spaced too.
    """
    if number < len(groups):
        chosen = {i * len(groups) // number for i in range(number)}
        return [group[:1] if index in chosen else [] for index, group in enumerate(groups)]
    wanted = [0] * len(groups)
    while sum(wanted) < number:
        for index, group in enumerate(groups):
            if wanted[index] < len(group) and sum(wanted) < number:
                wanted[index] += 1
    return [[group[i * len(group) // count] for i in range(count)] for group, count in zip(groups, wanted, strict=True)]
