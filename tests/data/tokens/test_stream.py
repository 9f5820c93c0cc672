"""A streamed corpus: the same tokens as from local files, whatever the server does and whenever the process dies."""

import contextlib
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import tracemalloc
from pathlib import Path

import collect as collect_stage
import pyarrow
import pytest
import tokenize_corpus
from faulty_server import FaultyServer
from repository import REPOSITORY
from resuming import killed_at
from tiny_pipeline import wait_until

from dynaroute.config import Settings, read_yaml
from dynaroute.config.data import ByteBPE, Corpus
from dynaroute.data.text import download
from dynaroute.data.text import sources as corpora
from dynaroute.data.text.collect import collect
from dynaroute.data.text.download import fetch
from dynaroute.data.tokens import encode
from dynaroute.data.tokens import stream as streaming
from dynaroute.data.tokens.encode import tokenize
from dynaroute.data.tokens.shard_writer import ShardWriter
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.stream import list_addresses, tokenize_stream
from dynaroute.data.tokens.tokenizers import save_tokenizer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline import artifacts

REGION = {"skip": 13, "validation": 6, "test": 9}
SHARD_TOKENS = 700
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "some", "cats", "Zwölf", "<|endoftext|>", "1234"]


def make_files(number: int = 4, documents: int = 20) -> dict[str, bytes]:
    """Files in Dolma's format of two gzips each; they hardly shrink: a third of one breaks off within a document."""
    draw = random.Random(7)
    files = {}
    for file in range(number):
        rows = [
            {"id": f"{file}-{index}", "text": " ".join(draw.choices(WORDS, k=draw.randrange(1, 90))),
             "source": draw.choice(["web", "books"]), "added": "2024-01-01", "metadata": {"key": draw.random()}}
            for index in range(documents)
        ]  # fmt: skip
        rows[3]["text"] = " \n"  # blank: not a document
        halves = ("".join(json.dumps(row) + "\n" for row in half) for half in (rows[::2], rows[1::2]))
        files[f"{file}.json.gz"] = b"".join(gzip.compress(half.encode(), mtime=0) for half in halves)
    return files


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    save_tokenizer(ByteBPE(kind="bpe", vocab_size=290), [" ".join(WORDS)] * 50, folder)
    return folder


DELAYS = {name: getattr(download, name) for name in ("FIRST_DELAY", "LONGEST_DELAY")}  # the real ones


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what only a power cut needs takes most of the time here
    monkeypatch.setattr(download, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(download, "LONGEST_DELAY", 0.01)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 400)


def make_corpus(tokenizer: Path, source: dict, split: dict | None = None) -> Corpus:
    own = {"kind": "hub", "path": str(tokenizer), "revision": None}
    return Corpus.model_validate({"source": source, "split": split or REGION, "tokenizer": own})


class Stream:
    """A corpus at a server, with the folders that its stages use."""

    def __init__(self, root: Path, address: str, server: FaultyServer, tokenizer: Path, **settings: object) -> None:
        root.mkdir()
        (root / "list.txt").write_text("".join(f"{address}/{name}\n" for name in server.files))
        source = {"kind": "dolma_stream", "path": str(root), "revision": None, "addresses": "list.txt", "files": None}
        self.corpus = make_corpus(tokenizer, source, **settings)
        self.root, self.tokens, self.scratch = root, root / "tokens", root / "scratch"
        list_addresses("c", self.corpus, root / "raw")

    def run(self) -> dict:
        self.scratch.mkdir(exist_ok=True)
        return tokenize_stream("c", self.corpus, self.root / "raw", self.tokens, self.scratch, SHARD_TOKENS)

    def content(self) -> dict[str, bytes]:
        """The arrays, and of the metadata what does not name the server."""
        found = {path.name: path.read_bytes() for path in self.tokens.glob("*.npy")}
        metadata = json.loads((self.tokens / "metadata.json").read_text())
        for file in metadata["files"]:
            file["address"] = file["address"].rpartition("/")[2]
        return found | {"metadata": json.dumps(metadata).encode()}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return make_files()


@pytest.fixture
def server(files) -> FaultyServer:
    return FaultyServer(dict(files))


@pytest.fixture
def address(server) -> str:
    with server.running() as address:
        yield address


@pytest.fixture
def stream(tmp_path, server, address, tokenizer) -> Stream:
    return Stream(tmp_path / "stream", address, server, tokenizer)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, files, tokenizer) -> dict[str, bytes]:
    server = FaultyServer(files)
    with server.running() as address:
        stream = Stream(tmp_path_factory.mktemp("undisturbed") / "stream", address, server, tokenizer)
        stream.run()
    return stream.content()


@pytest.mark.parametrize("split", [REGION, {"validation": 0.2, "test": 0.3}], ids=["region", "shares"])
def test_a_stream_gives_the_tokens_that_local_files_give(tmp_path, server, address, tokenizer, files, split):
    stream = Stream(tmp_path / "stream", address, server, tokenizer, split=split)
    metadata = stream.run()
    (tmp_path / "files").mkdir()
    for name, data in files.items():
        (tmp_path / "files" / name).write_bytes(data)
    local = make_corpus(tokenizer, {"kind": "dolma", "paths": [str(tmp_path / "files" / "*.gz")]}, split)
    collect("c", local, tmp_path / "raw")
    expected = tokenize("c", local.tokenizer, tmp_path / "raw", tmp_path / "tokens", SHARD_TOKENS)
    arrays = sorted(path.name for path in (tmp_path / "tokens").glob("*.npy"))
    assert len(arrays) > 12
    if split == REGION:  # else sources are numbered in another order
        assert sorted(path.name for path in stream.tokens.glob("*.npy")) == arrays
        for name in arrays:
            if not name.endswith("-sources.npy"):
                assert (stream.tokens / name).read_bytes() == (tmp_path / "tokens" / name).read_bytes(), name
    for part in ("train", "validation", "test"):
        ours, theirs = TokenShards(stream.tokens, part), TokenShards(tmp_path / "tokens", part)
        assert ours.read(0, 10**6).tolist() == theirs.read(0, 10**6).tolist()
        assert [ours.sources[i] for i in ours.document_sources] == [theirs.sources[i] for i in theirs.document_sources]
        one, other = metadata["splits"][part], expected["splits"][part]
        for key in ("num_tokens", "num_documents", "num_characters", "unigram_entropy", "tokens_by_source"):
            assert one[key] == other[key], key
    for file, (name, data) in zip(metadata["files"], files.items(), strict=True):
        hashed = hashlib.sha256(data).hexdigest()
        assert file == {"address": f"{address}/{name}", "bytes": len(data), "sha256": hashed, "documents": 19}
    assert not stream.scratch.exists()


FAULTS = ["drop", "reset", "labelled", "unstated", 416, 429, 500, 503, "stall"]
OF_RANGES = ["ignore_range", "wrong_range", "first_member", "other_total"]  # befall a download that resumes
RESUMED = [*OF_RANGES, "truncate", "unstated", 416]
MIXED = [random.Random(seed).choices([*FAULTS[:-1], *OF_RANGES], k=5) for seed in range(4)]  # the last takes long


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_nothing(stream, server, undisturbed, fault, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUTS", (20, 0.2 if fault == "stall" else 60))
    server.faults = {"0.json.gz": [fault], "2.json.gz": [fault, fault]}
    stream.run()
    assert stream.content() == undisturbed
    asked = [name for name, _ in server.requests].count("2.json.gz")
    assert asked == (1 if fault in ("labelled", "unstated") else 3)


@pytest.mark.parametrize("faults", [*(["drop", fault] for fault in RESUMED), *MIXED], ids=str)
def test_faults_one_after_the_other_change_nothing(stream, server, undisturbed, faults):
    server.faults = {name: [*faults] for name in server.files}
    stream.run()
    assert stream.content() == undisturbed


def test_zstd_files_give_the_tokens_that_gzips_give(stream, server, undisturbed):
    for name, data in server.files.items():
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as file:
            file.write(gzip.decompress(data))
        server.files[name] = sink.getvalue().to_pybytes()
    server.faults = {"1.json.gz": ["drop", "drop"]}
    stream.run()
    found = stream.content()
    assert found.pop("metadata") != undisturbed["metadata"]  # it names the files' sizes
    assert found == {name: content for name, content in undisturbed.items() if name != "metadata"}


@pytest.mark.parametrize("damage", [b"<html>Log in</html>", -9, 500], ids=["page", "cut", "garbled"])
def test_a_damaged_file_stops_the_run_by_name_and_is_fetched_again_by_the_next(
    stream, server, address, undisturbed, damage
):
    whole = server.files["1.json.gz"]
    if isinstance(damage, int):
        damage = whole[:damage] + (b"x" + whole[damage + 1 :] if damage > 0 else b"")
    server.files["1.json.gz"] = damage
    with pytest.raises(DynarouteError, match=rf"^{address}/1\.json\.gz(: damaged gzip or zstd|, line)"):
        stream.run()
    server.files["1.json.gz"] = whole
    stream.run()
    assert stream.content() == undisturbed


def test_a_download_that_broke_off_goes_on_where_it_stopped(stream, server, files):
    server.faults = {"1.json.gz": ["drop", "drop"]}
    stream.run()
    size = len(files["1.json.gz"])
    starts = [start for name, start in server.requests if name == "1.json.gz"]
    assert starts == [0, size // 3, size // 3 + (size - size // 3) // 3]


@pytest.mark.parametrize("crash_at", [0, 1, 12, 19, 20, 37, 57, 75, 130, 170])
def test_a_run_that_died_anywhere_ends_as_one_that_did_not(stream, undisturbed, monkeypatch, crash_at):
    """Documents are written after the last note and files are left behind: all that must be dropped.

    Here documents come in parts, so that it also dies within one.
    """
    monkeypatch.setattr(corpora, "PART_CHARACTERS", 100)
    with killed_at(ShardWriter, "write", crash_at):
        stream.run()
    assert not stream.tokens.exists()
    stream.run()
    assert stream.content() == undisturbed


def test_a_process_killed_time_and_again_ends_as_one_that_was_not(stream, undisturbed):
    def noted() -> int:
        with contextlib.suppress(OSError):
            return json.loads((stream.scratch / "progress.json").read_text())["documents"]
        return 0

    for enough in (15, 45):
        process = multiprocessing.get_context("spawn").Process(target=run_slowly, args=(stream,))
        process.start()
        wait_until(lambda enough=enough: noted() >= enough)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 45 <= noted() < 76
    stream.run()
    assert stream.content() == undisturbed


def run_slowly(stream: Stream) -> None:
    """In a process of its own, for which nothing is patched yet."""
    encode.BATCH_CHARACTERS = 400
    write = ShardWriter.write
    ShardWriter.write = lambda *args: (time.sleep(0.01), write(*args))
    stream.run()


@pytest.mark.parametrize("moment", ["flush", "replace", "copytree", "copy flush", "copy replace"])
def test_a_run_killed_while_it_publishes_reads_nothing_again(stream, server, undisturbed, monkeypatch, moment):
    """What is copied goes to another file system."""
    steps = {"flush": artifacts.flush, "replace": Path.replace, "copytree": shutil.copytree}

    def step(name: str, path: Path, *rest: object, **options: bool) -> object:
        if Path(path).suffix == ".npy" or path in (stream.scratch / "tokens", stream.root / ".tokens.tmp"):
            if moment == ("copy " if ".tokens.tmp" in path.parts else "") + name:
                raise KeyboardInterrupt
            if name == "replace" and path.parent == stream.scratch:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return steps[name](path, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for owner, name in ((artifacts, "flush"), (Path, "replace"), (shutil, "copytree")):
            patch.setattr(owner, name, lambda *rest, name=name, **options: step(name, *rest, **options))
        stream.run()
    assert not stream.tokens.exists()
    shutil.rmtree(stream.root / ".tokens.tmp", ignore_errors=True)  # `make recover`
    server.requests.clear()
    stream.run()
    assert stream.content() == undisturbed
    assert not server.requests
    assert not stream.scratch.exists()


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 2**10)
    peaks, sizes = [], []
    for number, documents in enumerate((40, 40, 1600)):  # the first time, modules are loaded as well
        server = FaultyServer(make_files(2, documents))
        with server.running() as address:
            stream = Stream(tmp_path / str(number), address, server, tokenizer)
            stream.scratch.mkdir()
            folders = (stream.root / "raw", stream.tokens, stream.scratch)
            tracemalloc.start()
            metadata = tokenize_stream("c", stream.corpus, *folders, shard_tokens=2**12)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            sizes.append(sum(len(gzip.decompress(data)) for data in server.files.values()))
    assert metadata["splits"]["train"]["num_documents"] == 2 * 1599 - 15
    assert sizes[2] > 30 * sizes[1] > 0
    assert peaks[2] < 1.5 * peaks[1]
    assert sizes[2] > peaks[2]  # or all of it could be held without notice


def test_few_files_lie_on_disk_at_once(tmp_path, tokenizer, monkeypatch):
    numbers, fetch = [], streaming.fetch

    def watched(address: str, path: Path, stop: threading.Event) -> None:
        fetch(address, path, stop)
        numbers.append(len(list(path.parent.iterdir())))

    monkeypatch.setattr(streaming, "fetch", watched)
    server = FaultyServer(make_files(15, 20))
    with server.running() as address:
        Stream(tmp_path / "stream", address, server, tokenizer).run()
    assert 1 < max(numbers) <= streaming.DOWNLOADS


def test_off_a_terminal_a_line_for_each_file_says_how_far_it_is(stream, capsys):
    stream.run()
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == [
        f"c: {number} of 4 files, {19 * number} documents" for number in (1, 2, 3, 4)
    ]


def test_a_file_that_is_not_there_stops_the_run_at_once(stream, server):
    del server.files["1.json.gz"]
    with pytest.raises(DynarouteError, match=r"/1\.json\.gz: the server answers 404 Not Found$"):
        stream.run()
    assert [name for name, _ in server.requests].count("1.json.gz") == 1


def test_a_server_that_never_recovers_is_given_up_until_it_has(stream, server, undisturbed, monkeypatch):
    monkeypatch.setattr(download, "FAILURES", 4)
    server.faults = {"2.json.gz": [503] * 30}
    with pytest.raises(DynarouteError, match=r"/2\.json\.gz: 4 failures without progress, [^\n]*: 503 Server[^\n]*$"):
        stream.run()
    assert len(server.faults["2.json.gz"]) == 26
    server.faults = {}
    stream.run()
    assert stream.content() == undisturbed


def test_a_server_that_is_down_is_asked_again_for_more_than_20_minutes(tmp_path, server, address, monkeypatch):
    for name, delay in DELAYS.items():
        monkeypatch.setattr(download, name, delay)
    server.faults = {"2.json.gz": [503] * 30}
    seconds, stop = [], threading.Event()
    monkeypatch.setattr(stop, "wait", lambda timeout: seconds.append(timeout))
    with pytest.raises(DynarouteError, match=r"2\.json\.gz: \d+ failures without progress, .*503"):
        fetch(f"{address}/2.json.gz", tmp_path / "2.gz", stop)
    assert sum(seconds) > 20 * 60
    assert max(seconds) <= 120


def test_a_download_is_on_disk_before_it_has_its_name(tmp_path, server, address, monkeypatch):
    path, flushed = tmp_path / "0.gz", []
    monkeypatch.setattr(download, "flush", lambda what: flushed.append((what.name, path.exists())))
    fetch(f"{address}/0.json.gz", path, threading.Event())
    assert flushed == [("0.gz.part", False)]


def test_a_damaged_line_is_named_by_address(stream, server, address):
    lines = gzip.decompress(server.files["1.json.gz"]).split(b"\n")
    server.files["1.json.gz"] = gzip.compress(b"\n".join([*lines[:5], b"{", *lines[5:]]))
    with pytest.raises(DynarouteError, match=rf"^{address}/1\.json\.gz, line 6: not valid JSON"):
        stream.run()


def test_a_corpus_that_ends_within_its_region_is_refused(tmp_path, server, address, tokenizer):
    stream = Stream(tmp_path / "stream", address, server, tokenizer, split={"skip": 60, "validation": 10, "test": 9})
    with pytest.raises(DynarouteError, match=r"c: 6 of the 76 documents fell to test at split\.test = 9"):
        stream.run()


@pytest.mark.parametrize(
    ("text", "files", "problem"),
    [
        ("http://a/1.gz\nhttp://a/1.gz\n", None, "http://a/1.gz occurs twice: its text would count twice"),
        ("http://a/1.gz\nftp://a/2.gz\n", None, "'ftp://a/2.gz' is no http or https address"),
        ("https:///2.gz\n", None, "'https:///2.gz' is no http or https address"),
        ("http://exa mple/2.gz\n", None, "'http://exa mple/2.gz' is no http or https address"),
        ("http://a/1.gz\n\n", 2, "has 1 lines, fewer than files = 2"),
        ("\n", None, "has 0 lines, fewer than files = 1"),
        (None, None, "cannot be read: "),
    ],
)
def test_a_list_that_is_none_is_named(tmp_path, tokenizer, text, files, problem):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    source = {"kind": "dolma_stream", "path": str(tmp_path), "revision": None, "addresses": "list.txt", "files": files}
    with pytest.raises(DynarouteError, match=f"^corpora.c.source.addresses: list.txt of {tmp_path}.*{problem}"):
        list_addresses("c", make_corpus(tokenizer, source), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_the_stages_stream_a_corpus(tmp_path, server, address, tokenizer, monkeypatch, capsys):
    """As `dvc repro tokenize@mine` runs them; only the first file is asked for."""
    (tmp_path / "urls").mkdir()
    (tmp_path / "urls" / "v1.txt").write_text("".join(f"{address}/{name}\n" for name in server.files))
    params = read_yaml(REPOSITORY / "params.yaml")
    params["corpora"]["mine"] = {
        "source": {"kind": "dolma_stream", "path": ".", "revision": None, "addresses": "urls/v1.txt", "files": 1},
        "split": {"skip": 2, "validation": 3, "test": 4},
        "tokenizer": {"kind": "hub", "path": str(tokenizer), "revision": None},
    }
    monkeypatch.chdir(tmp_path)
    for stage in (collect_stage, tokenize_corpus):
        stage.main(Settings.model_validate(params), "mine")
    assert capsys.readouterr().err.startswith("mine: 1 of 1 files, 19 documents, ")
    tokens = tmp_path / "data/tokens/mine"
    assert [TokenShards(tokens, split).num_documents for split in ("train", "validation", "test")] == [12, 3, 4]
    assert not list((tmp_path / ".scratch/tokenize_corpus").iterdir())
