"""The stage train_dagformer, from files to files."""

from pathlib import Path

import numpy as np
import pytest
import torch
import train_dagformer
from safetensors.torch import load_file
from small_base import EMBEDDING, SEQ_LEN, VOCABULARY, make_base
from small_settings import default_settings
from small_tokens import write_tokens
from test_objective import STEPS, make_variant

from dynaroute.pipeline.artifacts import read_record, sha256, write_json
from dynaroute.training.checkpoints import load_checkpoint


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
    sizes = {"seq_len": SEQ_LEN, "train_windows": None, "validation_windows": 4}
    train_dagformer.main(default_settings(dagformer=sizes), "V")

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
