"""Damages files that the pipeline reads, one at a time, and sees what the code that reads them makes of it.

    python faults/corruption.py --workspace .scratch/faults --cases 660

A bit is flipped, the end cut off, or a block of 512 bytes set to zero, at a random place of a random file of each kind
in turn, of those alone that are read: no file may be empty and the values still be the same. Reading it as the stages
do must give the very values that were written (damage to a space in JSON changes none), or a DynarouteError that names
the file. Every case runs in a process of its own, so that a crash is seen too.

Writes  reports/reliability/corruption.json
"""

import dataclasses
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workspace import REPOSITORY, Row, finished_workspace, parse_arguments, run_campaign, with_log

from dynaroute import artifacts
from dynaroute.artifacts import CHECKSUMS, read_json, read_note, write_note
from dynaroute.config import Settings, load_settings
from dynaroute.dagformer.base import load_base
from dynaroute.dagformer.encoders import load_embeddings
from dynaroute.dagformer.trained import load_predictor
from dynaroute.data.collection import read_documents
from dynaroute.data.shard_writer import ShardWriter, SplitState
from dynaroute.data.shards import TokenShards
from dynaroute.data.tokenizers import load_tokenizer
from dynaroute.dwr.experts import ExpertStore
from dynaroute.dwr.inference import load_resident
from dynaroute.dwr.trace import load_trace
from dynaroute.errors import DynarouteError
from dynaroute.evaluation.nll import read_nll
from dynaroute.reporting import cached_inference
from dynaroute.reporting.dagformer import analyses, results
from dynaroute.reporting.dwr import results as dwr_results
from dynaroute.training.checkpoints import load_checkpoint

sys.path.insert(0, str(REPOSITORY / "stages"))

import export_experts
import train_dagformer

DAMAGED = Path(".scratch/damaged.json")  # what a file was, while it is damaged
SPLITS = ("train", "validation", "test")
TOKENS, STORE, DAGFORMER = Path("data/tokens/docs"), Path("data/dwr/expert_store"), Path("data/dagformer")
EMBEDDED = ("training", "evaluation", "domains")
STOPPED = Path(".scratch/stopped")  # a run that was stopped


def read_tokens() -> Any:
    """All that a split's reader offers, of all splits."""
    opened = [TokenShards(TOKENS, split) for split in SPLITS]
    return [[own.read(0, own.num_tokens), own.offsets, own.document_sources, own.metadata] for own in opened]


def read_tokenizer(folder: Path) -> Any:
    """What a tokenizer does to a text."""
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode_batch(["The function returns an array. Über 3.14 <|endoftext|>"])
    return ids, tokenizer.decode(list(range(tokenizer.vocab_size))), tokenizer.eot_id


def read_collected() -> Any:
    """The documents, as `tokenize` reads them."""
    folder = Path("data/raw/docs")
    return read_json(folder / "metadata.json"), [list(read_documents(folder / f"{split}.jsonl")) for split in SPLITS]


def read_store() -> Any:
    """The whole model, and how its experts are used."""
    store = ExpertStore(STORE)
    return load_resident(store).state_dict(), store.usage.model_dump(), store.run, store.precision


def read_model(folder: Path) -> Any:
    """A base's weights and configuration."""
    base = load_base(folder, "cpu")
    return base.state_dict(), base.config.to_dict()


def read_dwr_reports() -> Any:
    """What the DWR reports are made of."""
    found = dwr_results.read_results()
    return found, dwr_results.read_measurements(found.run["run"]), cached_inference.read_results()


def read_dagformer_reports(settings: Settings) -> Any:
    """What the DAGFormer reports are made of."""
    found = results.read_results(settings)
    return found, analyses.read_analyses(settings, found), results.read_measurements(found)


def read_locked(files: list[Path]) -> Any:
    """Single files, compared with dvc.lock, which is read anew for it."""
    artifacts._recorded_by_dvc.cache_clear()
    return [artifacts.checked(path).read_bytes() for path in files]


def stop_a_run() -> None:
    """Leaves what a stopped `tokenize` of a stream leaves: tokens of three shards, and a note."""
    shutil.rmtree(STOPPED, ignore_errors=True)
    STOPPED.mkdir(parents=True)
    writer = ShardWriter(STOPPED, "train", {"docs": 0}, 512, shard_tokens=300)
    for length in (200, 250, 300):
        writer.write(np.arange(length), "docs", length)
    write_note(STOPPED / "progress.json", writer.flush())


def go_on() -> Any:
    """Takes a stopped run up in a copy, writes the rest, and reads all tokens."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / STOPPED.name
        shutil.copytree(STOPPED, copy)
        try:
            state = SplitState(*read_note(copy / "progress.json"))
            writer = ShardWriter(copy, "train", {"docs": 0}, 512, shard_tokens=300, state=state)
        except DynarouteError as error:
            raise DynarouteError(str(error).replace(str(copy), str(STOPPED))) from error
        writer.write(np.arange(100), "docs", 100)
        return writer.close()


def kinds(settings: Settings) -> dict[str, tuple[list[str], Callable[[], Any]]]:
    """For every kind of file, patterns that find its files, and what reads them."""
    variants = list(settings.variants)
    tables = [f"reports/dagformer/{name}.csv" for name in analyses.COLUMNS]
    locked = sorted(Path(name) for name in artifacts._recorded_by_dvc(Path.cwd()) if Path(name).is_file())
    return {
        "collected documents": (["data/raw/docs/*"], read_collected),
        "token shards": (["data/tokens/docs/*.npy"], read_tokens),
        "token metadata": (["data/tokens/docs/metadata.json"], read_tokens),
        "tokenizer": (["data/tokens/docs/tokenizer/*"], lambda: read_tokenizer(TOKENS / "tokenizer")),
        "tokenizer of the store": (["data/dwr/expert_store/tokenizer/*"], lambda: read_tokenizer(STORE / "tokenizer")),
        "DWR checkpoints": (
            ["data/dwr/train/*.safetensors"],
            lambda: [load_checkpoint(f"data/dwr/train/{name}.safetensors") for name in ("best", "last")],
        ),
        "DWR run record": (["data/dwr/train/run.json"], lambda: export_experts.load_trained()),
        "expert files": (["data/dwr/expert_store/*.safetensors"], read_store),
        "manifest": (["data/dwr/expert_store/manifest.json"], read_store),
        "expert load": (
            ["reports/dwr/router.csv"],
            lambda: export_experts.read_expert_load(Path("reports/dwr/router.csv"), ExpertStore(STORE).config),
        ),
        "routing trace": (["data/dwr/trace/*"], lambda: load_trace("data/dwr/trace")),
        "base model": (["data/dagformer/base/*"], lambda: read_model(DAGFORMER / "base")),
        "jointly trained base": (["data/dagformer/J1/base/*"], lambda: read_model(DAGFORMER / "J1/base")),
        "embeddings": (
            ["data/dagformer/embeddings/*/*"],
            lambda: [load_embeddings(DAGFORMER / "embeddings" / part) for part in EMBEDDED],
        ),
        "variants": (["data/dagformer/variants/*"], lambda: [train_dagformer.read_variant(name) for name in variants]),
        "predictors": (
            ["data/dagformer/P1/run.json", "data/dagformer/P1/predictor.safetensors"],
            lambda: load_predictor(DAGFORMER / "P1", "cpu"),
        ),
        "checkpoints to go on from": (
            ["data/dagformer/*/last.safetensors"],
            lambda: [load_checkpoint(DAGFORMER / name / "last.safetensors") for name in variants],
        ),
        "notes and tokens of a stopped run": ([".scratch/stopped/*"], go_on),
        "evaluated gates": (["data/eval/P1/gates.safetensors"], lambda: results.read_mean_gates("P1")),
        "NLL by window": (
            ["reports/dagformer/P1/nll.csv"],
            lambda: [read_nll(Path("reports/dagformer/P1/nll.csv"), protocol) for protocol in ("window", "prefix")],
        ),
        "analysed wirings": (["data/analysis/P1/wirings.safetensors"], lambda: analyses.read_wirings("P1")),
        "inputs of the DWR reports": (
            ["reports/dwr/*.json", "reports/dwr/*.csv", "data/raw/docs.source.json"],
            read_dwr_reports,
        ),
        "inputs of the DAGFormer reports": (
            [f"reports/{name}" for name in ("dagformer/*.json", "dagformer/*/[nt]*.*", "statistics/*", "*_measured/*")]
            + tables,
            lambda: read_dagformer_reports(settings),
        ),
        "dvc.lock": (["dvc.lock"], lambda: read_locked(locked)),
    }  # fmt: skip


def places(path: Path, content: bytes) -> Sequence[int]:
    """Where a file can be damaged so that what reads it may notice: anywhere, but for DVC's lock file.

    Stages look up the hashes of single outputs in it, and nothing else. The rest is DVC's, which runs what differs.
    """
    if path.name != "dvc.lock":
        return range(len(content))
    found: list[int] = []
    for outs in re.finditer(rb"^    outs:\n(?:    [- ] .*\n)+", content, re.MULTILINE):
        for own in re.finditer(rb"- path: .*\n      hash: md5\n      md5: [0-9a-f]{32}\n", outs[0]):
            found += range(outs.start() + own.start(), outs.start() + own.end())
    return found


def damage(content: bytes, where: int, draw: random.Random) -> tuple[str, bytes]:
    """What was done at a place or from it on, and the content after it; at least one bit differs."""
    match draw.choice(["bit", "bit", "bit", "cut", "cut", "zeros"]):
        case "bit":
            flipped = content[where] ^ 1 << draw.randrange(8)
            return "bit flipped", content[:where] + bytes([flipped]) + content[where + 1 :]
        case "cut":
            return "cut off", content[:where]
        case _:
            size = min(512, len(content) - where)
            changed = content[:where] + bytes(size) + content[where + size :]
            return ("zeros", changed) if changed != content else ("cut off", content[:where])


def facts(value: Any) -> Iterator[bytes]:
    """All of a value, in the same order every time."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().flatten().view(torch.uint8).numpy() if value.numel() else np.empty(0)
    if isinstance(value, np.ndarray):
        yield repr((str(value.dtype), value.shape)).encode() + value.tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield repr(key).encode()
            yield from facts(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)}".encode()
        for item in value:
            yield from facts(item)
    elif isinstance(value, torch.nn.Module):
        yield from facts(value.state_dict())
    elif dataclasses.is_dataclass(value):
        yield from facts(vars(value))
    elif hasattr(value, "to_csv"):  # of pandas
        yield value.to_csv().encode()
    elif hasattr(value, "model_dump"):  # of pydantic
        yield from facts(value.model_dump())
    else:
        yield repr(value).encode()


def read(load: Callable[[], Any]) -> str:
    """In a process of its own, what reading gives: "values" and their hash, "refused" and why, or what went wrong."""
    receive, send = os.pipe()
    if not (child := os.fork()):
        try:
            digest = hashlib.sha256()
            for fact in facts(load()):
                digest.update(fact)
            found = f"values {digest.hexdigest()}"
        except DynarouteError as error:
            found = f"refused {error}"
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(send, found.encode("utf-8", "replace")[:60_000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        found = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return found if found else f"killed by signal {os.WTERMSIG(status)}"


def judge(found: str, undisturbed: str, path: Path) -> str:
    """In words of ours; where the promise is broken, with what was said."""
    if found == undisturbed:
        return "the same values"
    if found.startswith("values"):
        return "other values, unnoticed"
    if not found.startswith("refused"):
        return with_log("a crash", found)
    named = str(path) in found or (path.name == CHECKSUMS and str(path.parent) in found)
    return "an error that names the file" if named else with_log("an error that does not name the file", found)


def main() -> None:
    """Damages, reads, judges, restores; writes a row for each case."""
    arguments = parse_arguments(__doc__, cases=660, seed=0)
    os.chdir(finished_workspace(arguments.workspace).root)
    os.environ["DVC_STAGE"] = "faults"  # as a stage that DVC runs: single files are compared with dvc.lock
    torch.set_num_threads(1)
    stop_a_run()
    ways = kinds(load_settings())
    undisturbed: dict[str, str] = {}
    files: dict[str, list[Path]] = {}
    restore()

    def read_with(path: Path, changed: bytes, load: Callable[[], Any]) -> str:
        write_note(DAMAGED, {"path": str(path), "content": path.read_bytes().hex()})
        try:
            path.write_bytes(changed)
            return read(load)
        finally:
            restore()

    def try_case(case: str, draw: random.Random) -> list[Row]:
        kind = list(ways)[int(case) % len(ways)]
        patterns, load = ways[kind]
        if kind not in files:
            undisturbed[kind] = read(load)
            assert undisturbed[kind].startswith("values"), f"{kind}: {undisturbed[kind]}"
            found = sorted(path for pattern in patterns for path in Path().glob(pattern) if path.is_file())
            found = [path for path in found if path.stat().st_size]
            unread = [str(path) for path in found if read_with(path, b"", load) == undisturbed[kind]]
            assert found and not unread, f"{kind}: nothing reads {', '.join(unread) or patterns}"
            files[kind] = found
        path = draw.choice(files[kind])
        content = path.read_bytes()
        what, changed = damage(content, draw.choice(places(path, content)), draw)
        outcome = judge(read_with(path, changed, load), undisturbed[kind], path)
        return [{"kind": kind, "file": str(path), "damage": what, "outcome": outcome}]

    run_campaign("corruption", arguments, [str(number) for number in range(arguments.cases)], try_case)


def restore() -> None:
    """Gives a damaged file its content again, also one that a killed campaign left."""
    if DAMAGED.exists():
        note = read_note(DAMAGED)
        Path(note["path"]).write_bytes(bytes.fromhex(note["content"]))
        DAMAGED.unlink()


if __name__ == "__main__":
    main()
