"""The stage train_dagformer: what it decides by itself. That it trains is seen where the pipeline runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import train_dagformer
from repository import REPOSITORY
from safetensors.torch import load_file
from small_base import EMBEDDING, SEQ_LEN, VOCABULARY, make_base
from small_tokens import write_tokens
from test_objective import STEPS, make, make_variant, validate

from dynaroute.config import load_settings
from dynaroute.pipeline.artifacts import read_record, sha256, write_json
from dynaroute.training.checkpoints import load_checkpoint

HARD = {"hard_nll_is_the_baseline_before_training": True}
BOTH = HARD | {"soft_nll_is_within_1_percent_of_the_baseline_before_training": True}


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, BOTH),
        ({"input_norm": "gate_mean"}, BOTH),
        ({"cascade": "off", "exempt_first_layer": False}, BOTH),
        ({"init_logit": 3.0}, HARD),
        ({"init_logit": 0.0}, {}),
        ({"init_logit": -3.0}, {}),
        ({"exempt_first_layer": False}, {}),
        *(({"input_norm": name}, {}) for name in ("rms_post", "ln_post", "rms_pre")),
    ],
)
def test_before_training_only_what_must_hold_is_checked(knobs, expected):
    predictor, objective = make(**knobs)
    metrics = validate(objective, predictor)
    row = {f"validation_{name}": value for name, value in metrics.items()}
    assert train_dagformer.checks_before_training(objective.variant, row) == expected
    assert (abs(metrics["nll_hard"] - metrics["nll_baseline"]) < 1e-5) == bool(expected)


def test_a_check_before_training_can_fail():
    row = {f"validation_nll_{mode}": value for mode, value in (("soft", 5.1), ("hard", 5.001), ("baseline", 5.0))}
    assert train_dagformer.checks_before_training(make_variant(), row) == dict.fromkeys(BOTH, False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_lr", [0.0, 1e-2])
def test_a_variant_is_trained_on_the_base_in_the_dtype_that_is_recorded(tmp_path, monkeypatch, dtype, base_lr):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    splits = {
        split: [np.random.default_rng(seed).integers(1, VOCABULARY, 12 * SEQ_LEN + 1).tolist()]
        for seed, split in enumerate(("train", "validation"))
    }
    write_tokens(Path("data/tokens/docs"), VOCABULARY, **splits)
    make_base().to(getattr(torch, dtype)).save_pretrained("data/dagformer/train/base")
    files = {}
    for seed, split in enumerate(splits):
        path = Path(f"data/dagformer/embeddings/training/{split}.npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.random.default_rng(seed).normal(size=(12, EMBEDDING)).astype("<f4"))
        files[split] = {"file": path.name, "windows": 12, "sha256": sha256(path)}
    write_json(path.parent / "metadata.json", {"embedding_size": EMBEDDING, "files": files})
    variant = make_variant(base_lr=base_lr)
    write_json("data/dagformer/variants/V.yaml", {"from": "base", **variant.model_dump()})
    settings = load_settings(REPOSITORY / "params.yaml")
    sizes = {"seq_len": SEQ_LEN, "train_windows": None, "validation_windows": 4}
    dagformer = settings.dagformer.model_copy(update=sizes)
    train_dagformer.main(settings.model_copy(update={"dagformer": dagformer, "num_threads": 1}), "V")

    identity = read_record("data/dagformer/train/V/run.json")["identity"]
    assert identity["base_dtype"] == dtype
    assert identity["dagformer"]["train_windows"] == 12  # all there are, and not null
    report = read_record("data/dagformer/train/V/training.json")
    assert report["steps"] == STEPS
    assert all(report["checks"].values())
    tensors, _ = load_checkpoint(Path("data/dagformer/train/V/last.safetensors"))
    assert {value.dtype for name, value in tensors.items() if name.startswith("model.")} == {torch.float32}
    assert Path("data/dagformer/train/V/base").exists() == bool(base_lr)
    if base_lr:  # it was trained in fp32, and is scored as the baseline is
        for name, value in load_file("data/dagformer/train/V/base/model.safetensors").items():
            assert value.dtype == getattr(torch, dtype)
            assert torch.equal(value, tensors[f"model.base.{name}"].to(value.dtype)), name
