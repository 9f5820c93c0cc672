"""Windows are assigned to documents and sources, and chosen evenly over documents."""

from pathlib import Path

import numpy as np
import pytest
from small_dagformer import write_tokens

from dynaroute.data.tokens.documents import (
    domain_windows,
    followed_windows,
    halves,
    main_documents,
    windows_of_documents,
)
from dynaroute.data.tokens.shard_writer import ShardWriter
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json

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


def one_document_of_bees(folder: Path, sources: list[str]) -> TokenShards:
    writer = ShardWriter(folder, "test", {}, 50)
    for source in ["ants", "ants", "ants", sources[-1]]:
        writer.write([1] * 60, source, 60)
    metadata = {"vocab_size": 50, "padded_vocab_size": 64, "eot_id": 0, "dtype": "uint16", "sources": sources}
    write_json(folder / "metadata.json", metadata | {"splits": {"test": writer.close()}})
    return TokenShards(folder, "test")


def test_gradients_and_removals_never_share_a_document():
    documents = np.array([-1, 0, 0, 3, 3, -1, 4, 5, 5, 5, -1, 7, 9])
    first, second = ({int(documents[window]) for window in half} for half in halves(documents, (99, 99)))
    assert not first & second
    assert first | second == {0, 3, 4, 5, 7, 9}
    few = halves(documents, (2, 3))
    assert [len(half) for half in few] == [2, 3]


def test_windows_are_chosen_evenly_over_documents_however_long_they_are():
    documents = np.repeat(np.arange(8), [90, 80, 3, 3, 3, 3, 3, 3])
    chosen = halves(documents, (8, 4))
    assert [np.bincount(documents[half])[parity::2].tolist() for parity, half in enumerate(chosen)] == [
        *([2, 2, 2, 2], [1, 1, 1, 1])
    ]


@pytest.mark.parametrize("documents", [[0, 0, 0, -1], [0, 1, 2, -1], [-1, -1]])
def test_too_few_documents_are_refused(documents):
    with pytest.raises(DynarouteError, match=r"analysis: too few documents .* hold a whole window \(\d\)"):
        halves(np.array(documents), (5, 4))


def test_text_without_windows_that_go_on_is_refused():
    with pytest.raises(DynarouteError, match=r"analysis.oracle_windows = 3: 1 documents .* in a row"):
        followed_windows(np.array([-1, 0, 0, 1, 2, -1, 3]), 3)


def test_more_sources_than_can_be_tested_are_no_domains(tmp_path, monkeypatch):
    shards = write_tokens(tmp_path, [100, 200, 100, 40])
    assert len(domain_windows(shards, T, most=9).sources) == 2
    monkeypatch.setattr("dynaroute.data.tokens.documents.MAX_SOURCES", 1)
    assert domain_windows(shards, T, most=9) is None
