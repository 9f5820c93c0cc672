"""Times tokenization, from documents on disk to token shards, against the tokenizer libraries' own batch calls.

    PYTHONPATH=src python benchmarks/benchmark_tokenization.py  (dvc repro benchmarks/dvc.yaml:benchmark_tokenization)

Reads   data/raw/<dwr.corpus>, data/tokens/<dwr.corpus>/tokenizer
Writes  reports/benchmarks/tokenization.json

    dynaroute    what the stage tokenize_corpus does: reads, parses and encodes documents, writes and hashes shards
    library      encodes texts that are already in memory, in one call on as many threads as there are cores:
                 tiktoken's encode_ordinary_batch, or encode_batch_fast of tokenizers with its lists of ids

The text is the training split, repeated until there is enough, in pieces small enough to keep all cores busy. The
tokenizers are the corpus's own and, where available, GPT-2's. Offline, TIKTOKEN_CACHE_DIR must name a folder with
GPT-2's files.

Every process is pinned to its cores. Candidates take turns, and ratios are medians over rounds. The library's speed-up
shows what more cores give on this machine. On a busy machine trust CPU time. The main thread's share of it bounds the
speed-up: it reads, parses, writes and hashes while other threads encode.
"""

import contextlib
import functools
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from timing import columns, quartiles, ratios, show, turns

from dynaroute.config import Settings
from dynaroute.config.data import GPT2
from dynaroute.data.text.collect import read_documents
from dynaroute.data.tokens.encode import encoded
from dynaroute.data.tokens.shard_writer import ShardWriter
from dynaroute.data.tokens.tokenizers import (
    TiktokenTokenizer,
    Tokenizer,
    available_cores,
    load_tokenizer,
    save_tokenizer,
)
from dynaroute.errors import DynarouteError
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


@functools.cache
def warm_tokenizer(folder: Path, _user: str) -> Tokenizer:
    """A tokenizer of its own for each user, kept over all rounds: tokenizers cache the words they have seen."""
    return load_tokenizer(folder)


class Times(NamedTuple):
    """Seconds of one run, or of every round."""

    clock: float
    cpu: float  # of all threads
    main: float  # CPU time of the main thread


def seconds(user: str, tokenizer_folder: Path, pieces: Path) -> Times:
    """The times of one run of dynaroute or of the library."""
    tokenizer = warm_tokenizer(tokenizer_folder, user)
    texts = [document.text for document in read_documents(pieces)] if user == "library" else []
    clocks = time.perf_counter, time.process_time, time.thread_time
    with tempfile.TemporaryDirectory() as folder:
        started = [clock() for clock in clocks]
        if user == "library":
            by_library(tokenizer, texts)
        else:
            by_dynaroute(tokenizer, pieces, Path(folder))
        return Times(*(clock() - start for clock, start in zip(clocks, started, strict=True)))


def measure(tokenizers: dict[str, Path], pieces: Path, core_counts: list[int]) -> list[dict[str, Any]]:
    """A row for each tokenizer and number of cores, which must include 1."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        pools = {
            count: stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), os.sched_setaffinity, (0, cores[:count]))
            )
            for count in core_counts
        }

        def timed(name: str, count: int, user: str) -> Times:
            return pools[count].submit(seconds, user, tokenizers[name], pieces).result()

        cells = itertools.product(tokenizers, core_counts, USERS)
        rounds = turns({cell: functools.partial(timed, *cell) for cell in cells}, ROUNDS, WARM_UP, "tokenization")
    times = {cell: Times(*zip(*found, strict=True)) for cell, found in rounds.items()}
    megabytes = sum(len(document.text.encode()) for document in read_documents(pieces)) / 1e6
    rows = []
    for name, count in itertools.product(tokenizers, core_counts):
        ours, library = (times[name, count, user] for user in USERS)
        ours_on_one, library_on_one = (times[name, 1, user] for user in USERS)
        package = "tiktoken" if isinstance(load_tokenizer(tokenizers[name]), TiktokenTokenizer) else "tokenizers"
        rows.append(
            {
                "tokenizer": name,
                "library": f"{package} {version(package)}",
                "cores": count,
                "megabytes_per_second": megabytes / quartiles(ours.clock)[0],
                "library_megabytes_per_second": megabytes / quartiles(library.clock)[0],
                **columns("throughput_against_library", ratios(library.clock, ours.clock)),
                "throughput_against_library_by_cpu_time": quartiles(ratios(library.cpu, ours.cpu))[0],
                "main_thread_share_of_cpu_time": quartiles(ratios(ours.main, ours.cpu))[0],
                "megabytes_per_cpu_second": megabytes / quartiles(ours.cpu)[0],
                **columns("speedup_over_one_core", ratios(ours_on_one.clock, ours.clock)),
                "library_speedup_over_one_core": quartiles(ratios(library_on_one.clock, library.clock))[0],
            }
        )
    return rows


def main(settings: Settings) -> None:
    """Measures, prints a table and writes the report."""
    if not hasattr(os, "sched_setaffinity"):
        raise DynarouteError("this benchmark needs Linux, where a process can be pinned to some of the cores")
    corpus, skipped, all_cores = settings.dwr.corpus, {}, available_cores()
    core_counts = sorted({all_cores, *(2**n for n in range(all_cores.bit_length()))})
    with tempfile.TemporaryDirectory() as name:
        pieces = Path(name) / "pieces.jsonl"
        write_pieces(Path("data/raw") / corpus / "train.jsonl", pieces)
        tokenizers = {corpus: Path("data/tokens") / corpus / "tokenizer"}
        if settings.corpus(corpus).tokenizer.kind != "gpt2":
            try:
                save_tokenizer(GPT2(kind="gpt2"), [], Path(name) / "gpt2")
                tokenizers["gpt2"] = Path(name) / "gpt2"
            except DynarouteError as error:
                skipped["gpt2"] = str(error)
                print(f"gpt2 is not measured: {error}")
        rows = measure(tokenizers, pieces, core_counts)
    show(rows, "tokenizer", "cores", "megabytes_per_second", "throughput_against_library", "speedup_over_one_core")
    report = {"characters": CHARACTERS, "rounds": ROUNDS, "results": rows, "not_measured": skipped}
    write_json("reports/benchmarks/tokenization.json", report | {"machine": describe_machine("cpu")})


if __name__ == "__main__":
    run(main, __doc__)
