"""Times tokenization, from documents on disk to token shards, against the tokenizer libraries' own batch calls.

    PYTHONPATH=src python benchmarks/benchmark_tokenization.py  (dvc repro benchmarks/dvc.yaml:benchmark_tokenization)

Reads   data/raw/<dwr.corpus>, data/tokens/<dwr.corpus>/tokenizer
Writes  reports/benchmarks/tokenization.json

    dynaroute    what the stage tokenize_corpus does: reads, parses and encodes documents, writes and hashes shards
    library      encodes texts that are already in memory, in one call on as many threads as there are cores:
                 tiktoken's encode_ordinary_batch, or encode_batch_fast of tokenizers with its lists of ids

The text is the training split, repeated until there is enough, in pieces small enough to keep all cores busy. Both take
turns, and ratios are medians over rounds. On a busy machine trust CPU time. The main thread's share of it bounds the
number of useful cores: it reads, parses, writes and hashes while other threads encode. To measure on fewer cores, start
it under `taskset`.
"""

import functools
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from timing import columns, quartiles, ratios, show, turns

from dynaroute.config import Settings
from dynaroute.data.text.collect import read_documents
from dynaroute.data.tokens.encode import encoded
from dynaroute.data.tokens.shard_writer import ShardWriter
from dynaroute.data.tokens.tokenizers import TiktokenTokenizer, Tokenizer, available_cores, load_tokenizer
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.machine import describe_machine
from dynaroute.pipeline.stage import run

CHARACTERS = 2**25  # of text: sixteen batches; the library holds its tokens as Python objects
PIECE = 2**14  # characters of a document at most
ROUNDS, WARM_UP = 5, 1
USERS = "dynaroute", "library"


def write_pieces(documents: Path, pieces: Path) -> None:
    """Writes CHARACTERS of text as `collect` writes documents, in pieces; repeats the documents if they are too few."""
    left = CHARACTERS
    with pieces.open("w", encoding="utf-8", newline="\n") as file:
        while left:
            for document in read_documents(documents):
                text = document.text[:left]
                left -= len(text)
                for start in range(0, len(text), PIECE):
                    piece = {"id": f"{left}-{start}", "text": text[start : start + PIECE], "source": document.source}
                    file.write(json.dumps(piece, ensure_ascii=False) + "\n")


def by_library(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return tokenizer.encoding.encode_ordinary_batch(texts, num_threads=available_cores())
    return [encoding.ids for encoding in tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def by_dynaroute(tokenizer: Tokenizer, pieces: Path, folder: Path) -> dict[str, Any]:
    """Writes the shards of one split into an existing folder, and returns the split's metadata."""
    writer = ShardWriter(folder, "train", {}, tokenizer.vocab_size)
    for document, ids in encoded(tokenizer, read_documents(pieces)):
        writer.write(ids, document.source, len(document.text), document.continues)
    return writer.close()


class Times(NamedTuple):
    """Seconds of one run, or of every round."""

    clock: float
    cpu: float  # of all threads
    main: float  # CPU time of the main thread


def seconds(user: str, tokenizer: Tokenizer, pieces: Path) -> Times:
    """The times of one run of dynaroute or of the library."""
    texts = [document.text for document in read_documents(pieces)] if user == "library" else []
    clocks = time.perf_counter, time.process_time, time.thread_time
    with tempfile.TemporaryDirectory() as folder:
        started = [clock() for clock in clocks]
        if user == "library":
            by_library(tokenizer, texts)
        else:
            by_dynaroute(tokenizer, pieces, Path(folder))
        return Times(*(clock() - start for clock, start in zip(clocks, started, strict=True)))


def measure(folder: Path, pieces: Path) -> dict[str, Any]:
    """The results for the tokenizer in a folder."""
    # One for each, since tokenizers cache the words they have seen.
    users = {user: functools.partial(seconds, user, load_tokenizer(folder), pieces) for user in USERS}
    rounds = turns(users, ROUNDS, WARM_UP, "tokenization")
    ours, library = (Times(*zip(*rounds[user], strict=True)) for user in USERS)
    megabytes = sum(len(document.text.encode()) for document in read_documents(pieces)) / 1e6
    package = "tiktoken" if isinstance(load_tokenizer(folder), TiktokenTokenizer) else "tokenizers"
    return {
        "library": f"{package} {version(package)}",
        "cores": available_cores(),
        "megabytes_per_second": megabytes / quartiles(ours.clock)[0],
        "megabytes_per_cpu_second": megabytes / quartiles(ours.cpu)[0],
        **columns("throughput_against_library", ratios(library.clock, ours.clock)),
        "main_thread_share_of_cpu_time": quartiles(ratios(ours.main, ours.cpu))[0],
    }


def main(settings: Settings) -> None:
    """Measures, prints the results and writes the report."""
    corpus = settings.dwr.corpus
    with tempfile.TemporaryDirectory() as name:
        pieces = Path(name) / "pieces.jsonl"
        write_pieces(Path("data/raw") / corpus / "train.jsonl", pieces)
        row = {"tokenizer": corpus} | measure(Path("data/tokens") / corpus / "tokenizer", pieces)
    show([row], *row)
    report = {"characters": CHARACTERS, "rounds": ROUNDS, "results": [row], "machine": describe_machine("cpu")}
    write_json("reports/benchmarks/tokenization.json", report)


if __name__ == "__main__":
    run(main, __doc__)
