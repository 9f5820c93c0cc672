"""What tells domains apart is found where it was planted, and not where only the documents differ."""

import numpy as np
import pytest
import torch

from dynaroute.analysis.domains import Domains, leave_one_group_out
from dynaroute.analysis.topology import jaccard_distances

SOURCES, DOCUMENTS, WINDOWS, GATES = 3, 6, 5, 30  # documents of a source, windows of a document
DOCUMENT_OF = np.repeat(np.arange(SOURCES * DOCUMENTS), WINDOWS)
SOURCE_OF = np.repeat(np.arange(SOURCES), DOCUMENTS)


def domains(permutations: int = 199) -> Domains:
    return Domains(DOCUMENT_OF, SOURCE_OF, permutations, seed=0)


def wirings(by_source: float, by_document: float, seed: int = 0) -> np.ndarray:
    """Soft gates, [n, GATES], that differ from window to window, and as told from source to source and so on."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 0.3, (len(DOCUMENT_OF), GATES))
    logits += by_document * rng.normal(size=(len(SOURCE_OF), GATES))[DOCUMENT_OF]
    logits[:, : GATES // 2] += by_source * rng.normal(size=(SOURCES, GATES // 2))[SOURCE_OF[DOCUMENT_OF]]
    return 1 / (1 + np.exp(-logits))


def distances(gates: np.ndarray) -> np.ndarray:
    return jaccard_distances(torch.from_numpy(gates), torch.from_numpy(gates)).numpy()


def test_planted_domains_are_found_by_every_test():
    gates = wirings(by_source=1.0, by_document=0.3)
    separation = domains().separation(distances(gates))
    assert separation.p == 1 / 200
    assert separation.observed > 0.02
    probe = domains().probe(gates)
    assert (probe.p, probe.observed > 0.9) == (1 / 200, True)


def test_documents_that_differ_are_not_taken_for_domains():
    """Windows taken as independent would find domains in each of these."""
    found = []
    for seed in range(40):
        gates = wirings(by_source=0.0, by_document=1.0, seed=seed)
        found.append([domains(99).separation(distances(gates)).p, domains(99).probe(gates).p])
    assert ((np.array(found) <= 0.05).mean(0) < 0.18).all()  # of 40, at 0.05 each


def test_one_wiring_for_all_texts_has_no_domains():
    gates = np.tile(wirings(1.0, 1.0)[:1], (len(DOCUMENT_OF), 1))
    assert domains().separation(distances(gates)) == (0.0, 0.0, 1.0)
    probe = domains().probe(gates)
    assert (probe.observed, probe.p) == (pytest.approx(1 / SOURCES), 1.0)


# As many windows of each of two sources, from documents of very different sizes: 3 of one source and 6 of the other.
UNEVEN = np.repeat(np.arange(9), [1, 3, 20, 1, 2, 3, 2, 2, 14])
UNEVEN_LABELS = np.repeat(np.arange(2), [3, 6])


@pytest.mark.parametrize("vary", [0.0, 1e-9])
def test_a_probe_of_nothing_tells_one_in_c_however_large_the_documents(vary):
    gates = 0.7 + vary * np.random.default_rng(0).normal(size=(len(UNEVEN), 5))
    probe = Domains(UNEVEN, UNEVEN_LABELS, 99, seed=0).probe(gates)
    assert probe == (pytest.approx(0.5), pytest.approx(0.5), 1.0)


def test_documents_of_different_sizes_are_not_taken_for_domains():
    """With the true labels alone, sources have as many windows each: that must not make them stand out."""
    documents = np.repeat(np.arange(21), [1, 3, 20, 4, 2, 10, *[1] * 4, 12, 24, *[2] * 5, 15, 4, 3, 8])
    labels = np.repeat(np.arange(3), [6, 6, 9])
    assert len(set(np.bincount(labels[documents]))) == 1
    p, planted = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        gates = rng.normal(0, 0.3, (len(documents), 20)) + rng.normal(size=(len(labels), 20))[documents]
        p.append(Domains(documents, labels, 39, seed).probe(gates).p)
        if seed < 5:
            gates += 0.8 * rng.normal(size=(3, 20))[labels[documents]]
            planted.append(Domains(documents, labels, 39, seed).probe(gates).p)
    assert 0.4 < np.mean(p) < 0.62  # of 100; 0.51 if each p of 1/40 .. 1 is as likely
    assert np.mean(np.array(p) <= 0.05) < 0.12
    assert max(planted) <= 0.05


def test_separation_and_mean_distances_are_means_over_pairs_of_different_documents():
    apart = distances(wirings(1.0, 0.5))
    sums, counts = np.zeros((SOURCES, SOURCES)), np.zeros((SOURCES, SOURCES))
    for i, one in enumerate(DOCUMENT_OF):
        for j, other in enumerate(DOCUMENT_OF):
            if one != other:
                sums[SOURCE_OF[one], SOURCE_OF[other]] += apart[i, j]
                counts[SOURCE_OF[one], SOURCE_OF[other]] += 1
    assert domains().mean_distances(apart) == pytest.approx(sums / counts)
    same = np.eye(SOURCES, dtype=bool)
    expected = sums[~same].sum() / counts[~same].sum() - sums[same].sum() / counts[same].sum()
    assert domains(1).separation(apart).observed == pytest.approx(expected)


def test_the_probe_answers_as_if_fitted_anew_without_each_document():
    kept = np.random.default_rng(0).permutation(len(DOCUMENT_OF))[:60]  # documents of different sizes, in any order
    features, documents = wirings(0.7, 0.5)[kept], DOCUMENT_OF[kept]
    targets = np.eye(SOURCES)[SOURCE_OF[documents]]
    weights = 1 / np.bincount(documents)[documents]
    assert len(set(weights)) > 1
    centred = features - np.average(features, axis=0, weights=weights)
    ridge = 0.1 * weights @ np.square(centred).sum(1) / len(set(documents))
    answers = leave_one_group_out(features, documents) @ targets
    for document in set(documents):
        own = document == documents
        x, y, w = centred[~own], targets[~own], weights[~own, None]
        coefficients = np.linalg.solve(x.T @ (w * x) + ridge * np.eye(GATES), x.T @ (w * y))
        assert answers[own] == pytest.approx(centred[own] @ coefficients, abs=1e-9)
