"""Damaged files: which of them DVC notices, and which the code that reads them."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_dagformer
import report_dwr
import torch
import train_dwr_run
from finished_run import contents
from tiny_pipeline import LOCATE, MEASURED, Workspace

from dynaroute.analysis.traces import load_trace
from dynaroute.config import load_settings
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.variants import load_predictor, read_variant
from dynaroute.data.tokens.encode import tokenize
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.errors import DynarouteError
from dynaroute.training.checkpoints import load_checkpoint

pytestmark = pytest.mark.faults

STORE, DAGFORMER = Path("data/dwr/expert_store"), Path("data/dagformer")
CHECKED = (
    "data/dwr/train/*.safetensors",
    "data/dagformer/train/*/[lp]*.safetensors",
    "data/dwr/expert_store/*.safetensors",
)
FLIPS = 300


def flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size - 1))  # a line break at the end may go unnoticed


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def put_junk(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(path.stat().st_size))


@pytest.fixture(scope="module")
def workspace(finished, tmp_path_factory) -> Workspace:
    return finished.copy(tmp_path_factory.mktemp("damaged") / "repository")


@pytest.mark.parametrize("damage", [flip_a_bit, cut, remove])
def test_dvc_names_every_damaged_output_and_repro_restores_it(workspace, finished, damage):
    draw, damaged = random.Random(damage.__name__), set()
    for stage, recorded in workspace.lock().items():
        for out in recorded["outs"]:
            path = workspace.root / out["path"]
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            if not LOCATE.endswith(stage) and not any(word in out["path"] for word in MEASURED):
                damage(draw.choice(files), draw)
                damaged.add(out["path"])
    status = json.loads(workspace.run("dvc", "status", "--json").stdout)
    problems = [problem for stage in status.values() for problem in stage if isinstance(problem, dict)]
    assert {path for problem in problems for path in problem.get("changed outs", {})} >= damaged
    workspace.run("dvc", "repro")
    assert contents(workspace) == contents(finished)


def test_a_bit_flipped_under_the_same_time_is_refused_in_checkpoints_and_experts_though_dvc_sees_nothing(
    workspace, monkeypatch
):
    monkeypatch.chdir(workspace.root)
    files, draw = sorted(path for pattern in CHECKED for path in Path().glob(pattern)), random.Random(0)

    def changed() -> set[str]:
        return json.loads(workspace.run("dvc", "status", "--json").stdout).keys() & workspace.lock().keys()

    for flip in range(FLIPS):
        path = draw.choice(files)
        content, times = path.read_bytes(), path.stat()
        flip_a_bit(path, draw)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(DynarouteError, match=path.name):
            ExpertStore(STORE).verify() if path.parent == STORE else load_checkpoint(path)
        if flip == FLIPS - 1:
            assert not changed()
            path.touch()
            assert changed()
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def read_tokens() -> None:
    for split in ("train", "validation", "test"):
        TokenShards("data/tokens/docs", split).tokenizer()


def read_store() -> None:
    store = ExpertStore(STORE)
    store.verify()
    store.read_backbone()


# By pattern of files: what reads them, and which damage it notices. Text without a length may be cut and be read.
ANY, OF_TEXT = (cut, remove, empty, put_junk), (remove, empty, put_junk)
READERS: dict[str, tuple[Callable[[], Any], tuple[Callable, ...]]] = {
    "data/raw/docs/*": (
        lambda: tokenize("docs", load_settings().corpus("docs").tokenizer, "data/raw/docs", ".scratch/tokens"), OF_TEXT,
    ),
    "data/tokens/docs/**/*": (read_tokens, ANY),
    "data/dwr/train/best.safetensors": (lambda: load_checkpoint("data/dwr/train/best.safetensors"), ANY),
    "data/dwr/expert_store/*.*": (read_store, ANY),
    "data/dwr/trace/*": (lambda: load_trace("data/dwr/trace"), ANY),
    "data/dwr/runs/*": (lambda: train_dwr_run.read_run("reference"), OF_TEXT),
    "data/dagformer/train/base/[cm]*": (lambda: load_base(DAGFORMER / "train/base", "cpu"), ANY),
    "data/dagformer/embeddings/training/*": (lambda: load_embeddings(DAGFORMER / "embeddings/training"), ANY),
    "data/dagformer/variants/P1.yaml": (lambda: read_variant(DAGFORMER / "variants", "P1"), OF_TEXT),
    "data/dagformer/train/P1/[pr]*": (lambda: load_predictor(DAGFORMER / "train/P1", "cpu"), ANY),
    "reports/dwr/*.csv": (lambda: report_dwr.main(load_settings()), OF_TEXT),
    "data/dagformer/*.json": (lambda: report_dagformer.main(load_settings()), ANY),
    "data/dagformer/[et]*/P1/[nt]*": (lambda: report_dagformer.main(load_settings()), OF_TEXT),
}  # fmt: skip


@pytest.mark.parametrize("pattern", READERS)
def test_a_file_that_is_missing_cut_or_not_what_it_should_be_is_refused_in_one_line(workspace, monkeypatch, pattern):
    monkeypatch.chdir(workspace.root)
    torch.set_num_threads(1)
    (read, damages), draw = READERS[pattern], random.Random(pattern)
    read()
    files = sorted(path for path in Path().glob(pattern) if path.is_file() and path.stat().st_size)
    for damage in damages:
        path = draw.choice(files)
        content = path.read_bytes()
        damage(path, draw)
        with pytest.raises(DynarouteError) as caught:
            read()
        path.write_bytes(content)
        assert str(path.parent) in str(caught.value), (damage.__name__, path)  # transformers names no file in it
        assert "\n" not in str(caught.value), (damage.__name__, path)
