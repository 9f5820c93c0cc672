"""Times tokenization, from documents on disk to token shards, against the tokenizer libraries' own batch calls.

    PYTHONPATH=src python stages/benchmark_tokenization.py    (or: dvc repro benchmarks/dvc.yaml:benchmark_tokenization)

Reads   data/raw/<dwr.corpus>, data/tokens/<dwr.corpus>/tokenizer
Writes  reports/benchmarks/tokenization.json

    dynaroute  what the stage tokenize_corpus does: reads and parses documents, encodes them, writes and sums shards
    library    encodes texts that are in memory already, in one call on as many threads as there are cores:
               tiktoken's encode_ordinary_batch, or encode_batch_fast of tokenizers with its lists of ids

The text is the training split, as often as it takes, cut into pieces that keep all cores busy. The tokenizers are the
corpus's own and, where it can be had, GPT-2's: without a network, TIKTOKEN_CACHE_DIR has to name a folder with its
files.

Every number of cores has a process of its own, which is kept to them. All take turns, so that what else the machine
does falls on all alike; ratios are medians over rounds of two times in the same round. Where it does much else, trust
CPU time: that of all threads, and the part of it that is the main thread's, which no number of cores makes shorter.
Nothing passes between processes. While others encode, the main thread reads, parses, writes and sums; alone it does so
with the first and the last of some eight batches. So c cores would be c times as fast up to about 1 / (that part), less
what threads wait for Python's lock, under which ids become arrays. Whether two cores are two is told by the library.
"""

import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynaroute.artifacts import write_json
from dynaroute.config import GPT2, Settings
from dynaroute.data.collection import read_documents
from dynaroute.data.shards import ShardWriter
from dynaroute.data.tokenization import encoded
from dynaroute.data.tokenizers import TiktokenTokenizer, Tokenizer, available_cores, load_tokenizer, save_tokenizer
from dynaroute.errors import DynarouteError
from dynaroute.stage import run

CHARACTERS = 2**24  # of text: eight batches; the library holds its tokens as Python objects
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
    writer = ShardWriter(folder, "train", [], tokenizer.vocab_size)
    for document, ids in encoded(tokenizer, read_documents(pieces)):
        writer.write(ids, document.source, len(document.text))
    return writer.close()


def keep_to(cores: int) -> None:
    """Leaves this process, and the threads that it starts, that many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


@functools.cache
def warm_tokenizer(folder: Path, _user: str) -> Tokenizer:
    """One for each user, kept over all rounds in a process: tokenizers remember what they have met."""
    return load_tokenizer(folder)


def seconds(tokenizer_folder: Path, pieces: Path) -> dict[str, tuple[float, float, float]]:
    """Of both, one after the other: by the clock, of all threads' CPU time, and of this thread's."""
    texts = [document.text for document in read_documents(pieces)]
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "library": lambda: by_library(warm_tokenizer(tokenizer_folder, "library"), texts),
            "dynaroute": lambda: by_dynaroute(warm_tokenizer(tokenizer_folder, "dynaroute"), pieces, Path(folder)),
        }
        found = {}
        for name, call in calls.items():
            clocks = time.perf_counter, time.process_time, time.thread_time
            started = [clock() for clock in clocks]
            call()
            found[name] = tuple(clock() - start for clock, start in zip(clocks, started, strict=True))
    return found


def quartiles(ones: Sequence[float], others: Sequence[float]) -> tuple[float, list[float]]:
    """Of the ratio of two times of the same round: its median, and the quartiles beside it."""
    low, median, high = statistics.quantiles([one / other for one, other in zip(ones, others, strict=True)], n=4)
    return median, [low, high]


def measure(tokenizers: dict[str, Path], pieces: Path, core_counts: list[int]) -> list[dict[str, Any]]:
    """A row for each tokenizer and number of cores."""
    spawn = get_context("spawn")
    pools = {cores: ProcessPoolExecutor(1, spawn, keep_to, (cores,)) for cores in core_counts}
    cells = list(itertools.product(tokenizers, core_counts))
    times: dict[tuple[str, int], list[dict[str, tuple[float, float, float]]]] = {cell: [] for cell in cells}
    try:
        for _ in tqdm(range(WARM_UP + ROUNDS), desc="benchmark_tokenization", unit="round", disable=None):
            for name, cores in cells:
                times[name, cores].append(pools[cores].submit(seconds, tokenizers[name], pieces).result())
    finally:
        for pool in pools.values():
            pool.shutdown()
    megabytes = sum(len(document.text.encode()) for document in read_documents(pieces)) / 1e6
    rows = []
    for name, cores in cells:
        (ours, cpu, main), (library, library_cpu, _) = (
            zip(*(found[who] for found in times[name, cores][WARM_UP:]), strict=True)
            for who in ("dynaroute", "library")
        )
        one, library_one = ([found[who][0] for found in times[name, 1][WARM_UP:]] for who in ("dynaroute", "library"))
        ratio, ratio_quartiles = quartiles(library, ours)
        speedup, speedup_quartiles = quartiles(one, ours)
        package = "tiktoken" if isinstance(load_tokenizer(tokenizers[name]), TiktokenTokenizer) else "tokenizers"
        rows.append(
            {
                "tokenizer": name,
                "library": f"{package} {version(package)}",
                "cores": cores,
                "megabytes_per_second": megabytes / statistics.median(ours),
                "library_megabytes_per_second": megabytes / statistics.median(library),
                "throughput_against_library": ratio,
                "throughput_against_library_quartiles": ratio_quartiles,
                "throughput_against_library_by_cpu_time": quartiles(library_cpu, cpu)[0],
                "main_thread_share_of_cpu_time": quartiles(main, cpu)[0],
                "megabytes_per_cpu_second": megabytes / statistics.median(cpu),
                "speedup_over_one_core": speedup,
                "speedup_over_one_core_quartiles": speedup_quartiles,
                "library_speedup_over_one_core": quartiles(library_one, library)[0],
            }
        )
    return rows


def main(settings: Settings) -> None:
    """Measures, prints a table and writes the report."""
    from dynaroute.machine import describe_machine  # imports torch, which the processes that measure do not need

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
    for row in rows:
        print(
            f"{row['tokenizer']}, {row['cores']} cores: {row['megabytes_per_second']:.1f} MB/s, "
            f"{row['throughput_against_library']:.2f} times {row['library']} "
            f"(by CPU time {row['throughput_against_library_by_cpu_time']:.2f}); "
            f"{row['speedup_over_one_core']:.2f} times one core ({row['library_speedup_over_one_core']:.2f} there)"
        )
    report = size | {"rounds": ROUNDS, "results": rows, "not_measured": skipped}
    write_json("reports/benchmarks/tokenization.json", report | {"machine": describe_machine("cpu")})


if __name__ == "__main__":
    run(main, __doc__)
