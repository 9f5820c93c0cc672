"""Training stages under the launcher of the paper settings, on two processes of this machine."""

import csv
import json
import os
import random
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import resolve_variants
from repository import REPOSITORY, stage_script
from ruamel.yaml import YAML
from small_base import EMBEDDING, SEQ_LEN, make_base
from small_tokens import write_tokens

from dynaroute.config import load_settings, read_yaml
from dynaroute.config.data import ByteBPE
from dynaroute.data.tokens.tokenizers import save_tokenizer
from dynaroute.pipeline.artifacts import sha256, write_json

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--main_process_port", "0"]
VOCABULARY = 260  # of a byte-level tokenizer


def make_tree(root: Path, **training: object) -> Path:
    """A working directory with settings and tokens of a small DWR model, with dropout."""
    params = read_yaml(REPOSITORY / "params.yaml")
    params["num_threads"] = 1
    params["dwr"] |= {
        "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "max_seq_len": 16,
    }  # fmt: skip
    params["benchmark_cache"] |= {"capacities": [1], "prompt_tokens": 4, "new_tokens": 4}
    params["simulate_cache"]["capacities"] = [1]
    params["dwr"]["training"] |= {
        "batch_size": 8, "micro_batch_size": 4, "warmup_steps": 2, "validate_every": 6, "checkpoint_every": 2,
        "early_stopping_patience": None, **training,
    }  # fmt: skip
    root.mkdir()
    YAML(typ="safe").dump(params, root / "params.yaml")
    draw = random.Random(0)
    splits = {"train": 1700, "validation": 333, "test": 200}
    tokens = {name: [draw.choices(range(1, 60), range(1, 60), k=size)] for name, size in splits.items()}
    write_tokens(root / "data/tokens/docs", 60, **tokens)
    return root


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "DVC_ROOT"} | {"OMP_NUM_THREADS": "1"}


def run(
    root: Path, launcher: list[str], stage: str, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess:
    command = [*launcher, str(stage_script(stage)), *arguments]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def set_launcher(root: Path, launcher: list[str]) -> None:
    path = root / "params.yaml"
    YAML(typ="safe").dump(read_yaml(path) | {"launcher": shlex.join(launcher)}, path)


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_two_processes_give_what_one_gives(tmp_path):
    on_two = [*ACCELERATE, "--multi_gpu", "--num_processes", "2"]  # there need not be GPUs
    for name, launcher in (("one", ["python"]), ("two", TORCHRUN), ("accelerate", on_two)):
        root = make_tree(tmp_path / name, epochs=1)
        set_launcher(root, launcher)
        run(root, PYTHON, "train_dwr")
    one, two, other = (tmp_path / name / "reports/dwr" for name in ("one", "two", "accelerate"))
    assert len(rows(one / "training.csv")) > 2
    for table in ("training.csv", "router.csv"):  # losses; gate norms, load and probability of every expert
        for ours, theirs in zip(rows(two / table), rows(one / table), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
        for ours, theirs in zip(rows(other / table), rows(two / table), strict=True):
            assert ours == pytest.approx(theirs, nan_ok=True)
    names = "one", "two", "accelerate"
    runs = [json.loads((tmp_path / name / "data/dwr/train/run.json").read_text()) for name in names]
    assert [run["identity"]["num_processes"] for run in runs] == [1, 2, 2]
    report = json.loads((tmp_path / "two/data/dwr/train/summary.json").read_text())
    assert all(holds for name, holds in report["checks"].items() if name != "validation_loss_is_below_unigram_entropy")
    assert not list((tmp_path / "two/.scratch/train_dwr").iterdir())


def test_a_launcher_takes_the_place_of_the_stage_and_no_shell_reads_it(tmp_path):
    root = make_tree(tmp_path / "tree")
    (root / "probe.py").write_text("import json, os, sys; print(json.dumps([os.getpid(), sys.argv]))")
    set_launcher(root, [sys.executable, "probe.py", "--log", "$(touch x); touch x"])
    script = str(stage_script("train_dagformer"))
    stage = subprocess.Popen([*PYTHON, script, "P1"], cwd=root, env=environment(), stdout=subprocess.PIPE, text=True)
    found, _ = stage.communicate(timeout=300)
    assert json.loads(found) == [stage.pid, ["probe.py", "--log", "$(touch x); touch x", script, "P1"]]
    assert not (root / "x").exists()


def test_a_launcher_that_is_not_there_is_named(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "tree")
    set_launcher(root, ["torchrunn", "--standalone"])
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", [str(stage_script("train_dwr"))])
    expected = "^train_dwr: params.yaml: launcher = 'torchrunn --standalone': torchrunn cannot be run: No such file or "
    with pytest.raises(SystemExit, match=expected):
        runpy.run_path(sys.argv[0], run_name="__main__")


def test_fewer_windows_to_validate_on_than_processes_are_refused_before_training(tmp_path):
    root = make_tree(tmp_path / "tree")
    write_tokens(root / "data/tokens/docs", VOCABULARY, train=[[1] * 1700], validation=[[1] * 15], test=[[1] * 200])
    done = run(root, TORCHRUN, "train_dwr", check=False)
    assert done.returncode != 0
    expected = "train_dwr: params.yaml: launcher starts 2 processes, but they have 1 windows to score together: "
    assert expected in done.stderr
    assert not (root / ".scratch/train_dwr").exists()


def make_dagformer_tree(root: Path) -> Path:
    """A working directory with settings, tokens and text vectors of a small DAGFormer, and a published base to load."""
    base = make_base()
    base.resize_token_embeddings(VOCABULARY)
    base.save_pretrained(root / "published")
    save_tokenizer(ByteBPE(kind="bpe", vocab_size=VOCABULARY), ["some text"], root / "published")
    params = read_yaml(REPOSITORY / "params.yaml")
    params |= {
        "num_threads": 1, "variants": {"P1": {"from": "base"}}, "predictor_hidden": 8, "rank": 2, "init_logit": 0.1,
        "steps": 6, "batch_size": 8, "micro_batch_size": 2, "lr": 3e-2, "validate_every": 2, "checkpoint_every": 1,
    }  # fmt: skip
    question = next(iter(params["analysis"]["primary"].values())) | {"left": ["P1"], "right": ["baseline"]}
    params["analysis"] |= {"variants": ["P1"], "primary": {"learned": question}}
    params["dagformer"] |= {
        "seq_len": SEQ_LEN, "train_windows": 20, "validation_windows": 5, "eval_windows": 5, "prefix_tokens": 6,
        "base": {"kind": "load", "path": "published", "revision": None},
    }  # fmt: skip
    YAML(typ="safe").dump(params, root / "params.yaml")
    rng, files, vectors = np.random.default_rng(0), {}, root / "data/dagformer/embeddings/training"
    vectors.mkdir(parents=True)
    splits = {name: [rng.integers(1, VOCABULARY, 400).tolist()] for name in ("train", "validation", "test")}
    write_tokens(root / "data/tokens/docs", VOCABULARY, **splits)
    shutil.copytree(root / "published", root / "data/tokens/docs/tokenizer", ignore=shutil.ignore_patterns("*model*"))
    for name, windows in (("train", 20), ("validation", 5)):
        np.save(vectors / f"{name}.npy", rng.normal(size=(windows, EMBEDDING)).astype("<f4"))
        files[name] = {"file": f"{name}.npy", "windows": windows, "sha256": sha256(vectors / f"{name}.npy")}
    write_json(vectors / "metadata.json", {"embedding_size": EMBEDDING, "files": files})
    return root


def test_two_processes_load_a_base_once_and_train_a_predictor_as_one_does(tmp_path, monkeypatch):
    root = make_dagformer_tree(tmp_path)
    monkeypatch.chdir(root)
    resolve_variants.main(load_settings())
    run(root, TORCHRUN, "prepare_base")
    assert json.loads((root / "data/dagformer/base.json").read_text())["checks"]["all_gates_at_one_reproduce_the_base"]
    tables = []
    for launcher in (PYTHON, TORCHRUN):
        run(root, launcher, "train_dagformer", "P1")
        tables.append(rows(root / "data/dagformer/train/P1/training.csv"))
        checks = json.loads((root / "data/dagformer/train/P1/training.json").read_text())["checks"]
        assert checks["base_is_unchanged_to_the_bit"]
    one, two = tables
    assert len(one) == 4
    assert one[-1]["validation_loss"] != one[0]["validation_loss"]  # it did train
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)
    assert not list((root / ".scratch/train_dagformer").iterdir())


def test_the_loss_of_one_process_ends_the_job_with_an_error_and_without_results(tmp_path):
    root = make_tree(tmp_path / "tree", epochs=10_000)
    job = subprocess.Popen(
        [*TORCHRUN, str(stage_script("train_dwr"))], cwd=root, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(root.glob(".scratch/train_dwr/*/last.safetensors")):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        ranks = {int(process.environ()["RANK"]): process for process in psutil.Process(job.pid).children()}
        assert sorted(ranks) == [0, 1]
        ranks[1].kill()
        _, said = job.communicate(timeout=120)
        assert job.returncode != 0
        assert "SIGKILL" in said
        assert not any(process.is_running() for process in ranks.values())
        assert not (root / "data/dwr").exists()
    finally:
        job.kill()
        job.wait()
