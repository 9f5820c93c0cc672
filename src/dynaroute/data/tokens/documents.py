"""Maps windows to documents and sources, and chooses windows evenly over documents."""

from itertools import chain
from typing import NamedTuple

import numpy as np

from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError

MAX_SOURCES = 64  # all pairs are compared; more sources are labels of documents rather than domains


class DomainWindows(NamedTuple):
    """Equally many windows from every source, each wholly within one document."""

    windows: list[int]  # [n] indices among all whole windows of the split
    documents: np.ndarray  # [n] int64, 0 .. m-1: the document of each window
    labels: np.ndarray  # [m] int64: the source of each document, an index into `sources`
    sources: list[str]  # C names; sources with windows of at least two documents


def domain_windows(shards: TokenShards, seq_len: int, most: int) -> DomainWindows | None:
    """Draws up to `most` windows of each source, evenly over its documents; as many of each as the smallest source has.

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
    """The document that holds each window of T tokens, int64 [windows]; -1 for windows across several documents."""
    first = np.arange((shards.num_tokens - 1) // seq_len) * seq_len
    document = np.searchsorted(shards.offsets, first, side="right") - 1
    return np.where(shards.offsets[document + 1] >= first + seq_len, document, -1)


def main_documents(shards: TokenShards, seq_len: int, windows: list[int]) -> np.ndarray:
    """The document that has most tokens of each given window, int64 [n]."""
    found = []
    for window in windows:
        start, stop = window * seq_len, (window + 1) * seq_len
        first = int(np.searchsorted(shards.offsets, start, side="right")) - 1
        last = int(np.searchsorted(shards.offsets, stop, side="left"))  # one past the last document
        found.append(first + int(np.diff(np.clip(shards.offsets[first : last + 1], start, stop)).argmax()))
    return np.array(found)


def spread_windows(shards: TokenShards, seq_len: int, most: int) -> list[int]:
    """At most `most` windows of T tokens that lie within one document each, spread evenly over a split's documents."""
    documents = windows_of_documents(shards, seq_len)
    return _draw(_by_document(np.flatnonzero(documents >= 0), documents), most)


def window_sources(shards: TokenShards, seq_len: int, windows: list[int]) -> np.ndarray:
    """The source that has most tokens of each given window, int64 [n], an index into the shards' `sources`."""
    return shards.document_sources[main_documents(shards, seq_len, windows)].astype(np.int64)


def evenly(groups: list[list[int]], number: int) -> list[list[int]]:
    """Chooses `number` items, as equally many from each group as sizes allow, evenly spaced within each group.

    There must be that many. With fewer items than groups, the groups that give one are evenly spaced too.
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


def halves(documents: np.ndarray, sizes: tuple[int, int]) -> list[list[int]]:
    """Two sets of windows from alternating documents, evenly chosen over documents; at most `sizes` windows in each.

    `documents` comes from `windows_of_documents`. Raises DynarouteError if a set has fewer than two documents.
    """
    pools = _by_document(np.flatnonzero(documents >= 0), documents)
    chosen = []
    for parity, most in enumerate(sizes):
        own = pools[parity::2]
        if len(own) < 2:
            found = f"too few documents of the test split hold a whole window ({len(pools)})"
            raise DynarouteError(f"analysis: {found}: raise corpora's split.test, or lower dagformer.seq_len")
        chosen.append(_draw(own, most))
    return chosen


def followed_windows(documents: np.ndarray, most: int) -> list[int]:
    """At most `most` windows whose next window is of the same document, evenly chosen over documents.

    `documents` comes from `windows_of_documents`. Raises DynarouteError if fewer than two documents have such windows.
    """
    followed = np.flatnonzero((documents[:-1] >= 0) & (documents[:-1] == documents[1:]))
    pools = _by_document(followed, documents)
    if len(pools) < 2:
        found = f"{len(pools)} documents of the test split hold two windows in a row"
        raise DynarouteError(f"analysis.oracle_windows = {most}: {found}, and two are needed")
    return _draw(pools, most)


def _by_document(windows: np.ndarray, documents: np.ndarray) -> list[list[int]]:
    return [windows[documents[windows] == document].tolist() for document in np.unique(documents[windows])]


def _draw(pools: list[list[int]], most: int) -> list[int]:
    return list(chain.from_iterable(evenly(pools, min(most, sum(map(len, pools))))))
