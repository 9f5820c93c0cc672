"""What tells domains apart is found where it was planted, and not where only the documents differ."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_dagformer import write_tokens

from dynaroute.artifacts import write_json
from dynaroute.data.shard_writer import ShardWriter
from dynaroute.data.shards import TokenShards
from dynaroute.evaluation.domains import (
    Domains,
    domain_windows,
    leave_one_group_out,
    main_documents,
    windows_of_documents,
)
from dynaroute.evaluation.statistics import holm
from dynaroute.evaluation.topology import jaccard_distances

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
    explained = domains(1999).explained(gates)
    assert (holm(explained.p) < 0.05)[: GATES // 2].mean() > 0.6
    assert (holm(explained.p) < 0.05)[GATES // 2 :].mean() < 0.1


def test_documents_that_differ_are_not_taken_for_domains():
    """Windows taken as independent would find domains in each of these."""
    found = []
    for seed in range(40):
        gates = wirings(by_source=0.0, by_document=1.0, seed=seed)
        found.append([domains(99).separation(distances(gates)).p, domains(99).probe(gates).p])
        found[-1].append(domains(99).explained(gates[:, :1]).p[0])
    assert ((np.array(found) <= 0.05).mean(0) < 0.18).all()  # of 40, at 0.05 each


def test_one_wiring_for_all_texts_has_no_domains():
    gates = np.tile(wirings(1.0, 1.0)[:1], (len(DOCUMENT_OF), 1))
    assert domains().separation(distances(gates)) == (0.0, 0.0, 1.0)
    probe = domains().probe(gates)
    assert (probe.observed, probe.p) == (pytest.approx(1 / SOURCES), 1.0)
    explained = domains().explained(gates)
    assert not explained.observed.any()
    assert (explained.p == 1).all()


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


def test_the_share_explained_is_one_less_what_is_left_within_sources():
    values = wirings(0.5, 0.5)[:, :4]
    source = SOURCE_OF[DOCUMENT_OF]
    within = sum(np.square(values[source == c] - values[source == c].mean(0)).sum(0) for c in range(SOURCES))
    assert domains(1).explained(values).observed == pytest.approx(
        1 - within / np.square(values - values.mean(0)).sum(0)
    )


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


# --- which windows are of which document ---------------------------------------------------------------------------

LENGTHS = [40, 9, 23, 70, 5, 60, 61, 40]  # from ants and bees in turn
T = 16


def test_windows_within_one_document_are_found(tmp_path):
    shards = write_tokens(tmp_path, LENGTHS)
    document_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    inside, main = windows_of_documents(shards, T), []
    for window in range((sum(LENGTHS) - 1) // T):
        own = document_of[window * T : (window + 1) * T]
        assert inside[window] == (own[0] if len(set(own)) == 1 else -1)
        main.append(np.bincount(own).argmax())
    assert len(inside) == len(main)
    assert main_documents(shards, T, list(range(len(main)))).tolist() == main


def test_windows_are_drawn_from_one_source_each_as_many_of_all_and_spread_over_documents(tmp_path):
    shards = write_tokens(tmp_path, [100, 200, 100, 40, 35, 40, 300, 90])  # no window of ants' 35 need be whole
    found = domain_windows(shards, T, most=9)
    source_of_token = np.repeat(shards.document_sources, np.diff(shards.offsets))
    assert found.sources == ["ants", "bees"]
    assert len(set(found.windows)) == len(found.windows) == 18
    for window, document in zip(found.windows, found.documents, strict=True):
        assert set(source_of_token[window * T : (window + 1) * T]) == {found.labels[document]}
    assert np.bincount(found.labels[found.documents]).tolist() == [9, 9]
    sizes = np.bincount(found.documents)
    assert sizes.min() > 0
    assert sizes.max() <= 5
    few = domain_windows(shards, T, most=1000)  # all that the poorer source has
    assert len(set(np.bincount(few.labels[few.documents]))) == 1
    assert domain_windows(shards, T, most=9).windows == found.windows


@pytest.mark.parametrize("sources", [["ants"], ["ants", "bees"]])
def test_without_two_sources_of_two_documents_there_are_no_domains(tmp_path, sources):
    shards = one_document_of_bees(tmp_path, sources)
    assert domain_windows(shards, T, most=9) is None


def test_more_sources_than_can_be_tested_are_no_domains(tmp_path, monkeypatch):
    shards = write_tokens(tmp_path, [100, 200, 100, 40])
    assert len(domain_windows(shards, T, most=9).sources) == 2
    monkeypatch.setattr("dynaroute.evaluation.domains.MAX_SOURCES", 1)
    assert domain_windows(shards, T, most=9) is None


def one_document_of_bees(folder: Path, sources: list[str]) -> TokenShards:
    writer = ShardWriter(folder, "test", {}, 50)
    for source in ["ants", "ants", "ants", sources[-1]]:
        writer.write([1] * 60, source, 60)
    metadata = {"vocab_size": 50, "padded_vocab_size": 64, "eot_id": 0, "dtype": "uint16", "sources": sources}
    write_json(folder / "metadata.json", metadata | {"splits": {"test": writer.close()}})
    return TokenShards(folder, "test")
