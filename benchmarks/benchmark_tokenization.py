"""Times tokenization, from documents on disk to token shards, against the tokenizer libraries' own batch calls.

    PYTHONPATH=src python benchmarks/benchmark_tokenization.py  (dvc repro benchmarks/dvc.yaml:benchmark_tokenization)

Reads   data/raw/<dwr.corpus>, data/tokens/<dwr.corpus>/tokenizer
Writes  reports/benchmarks/tokenization.json

    dynaroute    what the stage tokenize_corpus does: reads and parses documents, encodes them, writes and sums shards
    library      encodes texts that are in memory already, in one call on as many threads as there are cores:
                 tiktoken's encode_ordinary_batch, or encode_batch_fast of tokenizers with its lists of ids
    independent  on c cores, c processes that each do on one core all that dynaroute does, at the same time, and share
                 nothing: how much these cores give at all, which on a shared machine is less than c times as much

The text is the training split, as often as it takes, cut into pieces that keep all cores busy. The tokenizers are the
corpus's own and, where it can be had, GPT-2's: without a network, TIKTOKEN_CACHE_DIR has to name a folder with its
files.

Every process is kept to its cores. All take turns, so that what else the machine does falls on all alike; ratios are
medians over rounds of two times in the same round. Where it does much else, trust CPU time: that of all threads, and
the part of it that is the main thread's, which no number of cores makes shorter. While others encode, the main thread
reads, parses, writes and sums; alone it does so with the first and the last batch only. So c cores would be c times as
fast up to about 1 / (that part), less what threads wait for Python's lock, under which ids become arrays.
"""

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

from timing import columns, quartiles, ratio, ratios, show, turns

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
from dynaroute.pipeline.stage import run

CHARACTERS = 2**25  # of text: sixteen batches; the library holds its tokens as Python objects
PIECE = 2**14  # characters of a document at most
ROUNDS, WARM_UP = 5, 1


def write_pieces(documents: Path, pieces: Path) -> None:
    """Writes CHARACTERS of the documents as `collect` writes them, cut; all of them again where they are fewer."""
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


def keep_to(cores: list[int]) -> None:
    """Leaves this process, and the threads that it starts, these cores."""
    os.sched_setaffinity(0, cores)


@functools.cache
def warm_tokenizer(folder: Path, _user: str) -> Tokenizer:
    """One for each user, kept over all rounds in a process: tokenizers remember what they have met."""
    return load_tokenizer(folder)


class Times(NamedTuple):
    """Of one run, in seconds."""

    clock: float
    cpu: float  # of all threads
    main: float  # CPU time of the main thread


def seconds(user: str, tokenizer_folder: Path, pieces: Path) -> Times:
    """Of dynaroute, or of the library."""
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
    """A row for each tokenizer and number of cores, of which 1 is the first."""
    spawn, cores = get_context("spawn"), sorted(os.sched_getaffinity(0))
    pools = {count: ProcessPoolExecutor(1, spawn, keep_to, (cores[:count],)) for count in core_counts}
    alone = [ProcessPoolExecutor(1, spawn, keep_to, ([core],)) for core in cores[: max(core_counts)]]
    cells = list(itertools.product(tokenizers, core_counts))

    def all_users(name: str, count: int) -> dict[str, Times]:
        work = tokenizers[name], pieces
        found = {user: pools[count].submit(seconds, user, *work).result() for user in ("library", "dynaroute")}
        together = [pool.submit(seconds, "dynaroute", *work) for pool in alone[:count]]
        clocks, cpus, mains = zip(*(future.result() for future in together), strict=True)
        # as if one after the other had done as much in this time as all did in theirs
        independent = Times(1 / sum(1 / clock for clock in clocks), sum(cpus) / count, sum(mains) / count)
        return found | {"independent": independent}

    try:
        candidates = {cell: functools.partial(all_users, *cell) for cell in cells}
        times = turns(candidates, ROUNDS, WARM_UP, "benchmark_tokenization")
    finally:
        for pool in (*pools.values(), *alone):
            pool.shutdown()
    megabytes = sum(len(document.text.encode()) for document in read_documents(pieces)) / 1e6

    def of(who: str, name: str, count: int) -> Times:
        """Times of every round."""
        return Times(*zip(*(found[who] for found in times[name, count]), strict=True))

    rows = []
    for name, count in cells:
        ours, library, independent = (of(who, name, count) for who in ("dynaroute", "library", "independent"))
        package = "tiktoken" if isinstance(load_tokenizer(tokenizers[name]), TiktokenTokenizer) else "tokenizers"
        rows.append(
            {
                "tokenizer": name,
                "library": f"{package} {version(package)}",
                "cores": count,
                "megabytes_per_second": megabytes / quartiles(ours.clock)[0],
                "library_megabytes_per_second": megabytes / quartiles(library.clock)[0],
                **columns("throughput_against_library", ratios(library.clock, ours.clock)),
                "throughput_against_library_by_cpu_time": ratio(library.cpu, ours.cpu)[0],
                **columns("throughput_against_independent_processes", ratios(independent.clock, ours.clock)),
                "throughput_against_independent_processes_by_cpu_time": ratio(independent.cpu, ours.cpu)[0],
                "main_thread_share_of_cpu_time": ratio(ours.main, ours.cpu)[0],
                "megabytes_per_cpu_second": megabytes / quartiles(ours.cpu)[0],
                **columns("speedup_over_one_core", ratios(of("dynaroute", name, 1).clock, ours.clock)),
                "library_speedup_over_one_core": ratio(of("library", name, 1).clock, library.clock)[0],
                "independent_speedup_over_one_core": ratio(of("independent", name, 1).clock, independent.clock)[0],
            }
        )
    return rows


def main(settings: Settings) -> None:
    """Measures, prints a table and writes the report."""
    from dynaroute.pipeline.machine import (
        describe_machine,  # imports torch, which the processes that measure do not need
    )

    if not hasattr(os, "sched_setaffinity"):
        raise DynarouteError("this benchmark needs Linux, where a process can be kept to some of the cores")
    corpus, skipped = settings.dwr.corpus, {}
    all_cores = available_cores()
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
        size = {"characters": sum(len(document.text) for document in read_documents(pieces))}
    show(rows, "tokenizer", "cores", "megabytes_per_second", "throughput_against_library", "speedup_over_one_core")
    report = size | {"rounds": ROUNDS, "results": rows, "not_measured": skipped}
    write_json("reports/benchmarks/tokenization.json", report | {"machine": describe_machine("cpu")})


if __name__ == "__main__":
    run(main, __doc__)
