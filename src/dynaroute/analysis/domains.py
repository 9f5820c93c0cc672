"""Whether wirings differ by where a text is from. Domains are the sources of a corpus.

Windows of one document are alike whatever its source. So documents are the unit here: pairs of windows of one document
do not count, a probe is tested on documents that it was not fitted on, and permutations exchange the sources of whole
documents.

n windows   m documents   E features, such as the gates of a wiring   C sources
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dynaroute.analysis.nll import Wiring
from dynaroute.analysis.statistics import PermutationTest, permutation_test
from dynaroute.analysis.topology import jaccard_distances
from dynaroute.data.tokens.documents import DomainWindows

RIDGE = 0.1  # of the linear probe, relative to the mean square of a window's centred features
ROUNDING = 1e-14  # relative: features that vary less, by their squares, do not vary


class Domains:
    """Tests of what the sources of n windows tell about them; see `DomainWindows` for documents and labels."""

    def __init__(self, documents: np.ndarray, labels: np.ndarray, permutations: int, seed: int) -> None:
        self.documents, self.labels, self.permutations, self.seed = documents, labels, permutations, seed
        self.num_sources = int(labels.max()) + 1

    def separation(self, distances: np.ndarray) -> PermutationTest:
        """Mean distance of windows of different sources minus that of the same one; pairs of two documents only.

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

    def _test(self, statistic: Callable[[np.ndarray], float]) -> PermutationTest:
        return permutation_test(statistic, self.labels, self.permutations, self.seed)


def describe_domains(
    wiring: Wiring, vectors: np.ndarray, drawn: DomainWindows, permutations: int, seed: int
) -> dict[str, Any]:
    """What sources tell about wirings.

    Args:
        wiring: of the n windows.
        vectors: float [n, E] that the wirings were predicted from, each entry on the scale that the predictor reads.
        drawn: the windows.
        permutations: of every test.
        seed: of those.

    Returns:
        sources, windows_per_source, documents (per source); of soft gates separation (test), mean_distances [C, C] and
        the probe (test); the text_probe of the vectors (test).
    """
    domains = Domains(drawn.documents, drawn.labels, permutations, seed)
    found: dict[str, Any] = {
        "sources": drawn.sources,
        "windows_per_source": len(drawn.windows) // len(drawn.sources),
        "documents": np.bincount(drawn.labels).tolist(),
    }
    gates = wiring.gates("soft")
    distances = jaccard_distances(gates, gates).numpy()
    found["separation"] = _plain(domains.separation(distances))
    found["mean_distances"] = domains.mean_distances(distances).tolist()
    found["probe"] = _plain(domains.probe(gates.numpy()))
    found["text_probe"] = _plain(domains.probe(vectors))
    return found


def _plain(test: PermutationTest) -> dict[str, float]:
    return {key: float(value) for key, value in test._asdict().items()}


def leave_one_group_out(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The matrix [n, n] by which targets [n, C] become what ridge regression says of each row without its own group.

    All groups weigh the same: a row counts for one over the rows of its group, in the mean and in the squared error.
    Exactly what refitting without each group gives, by the identity for left-out residuals: with the hat matrix
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
