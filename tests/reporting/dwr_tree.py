"""A tree of files as the stages write them, small and made up, for reports to be made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from repository import REPOSITORY

from dynaroute.artifacts import sha256, write_csv, write_json
from dynaroute.config import read_yaml

RUN = "0123456789abcdef"
LAYERS, EXPERTS = 3, 4


def write_tree(root: Path) -> None:
    """Writes everything that the DWR reports read."""
    (root / "reports").mkdir()
    shutil.copy(REPOSITORY / "reports/reference.yaml", root / "reports")
    shutil.copy(REPOSITORY / "params.yaml", root)
    write_corpus(root)
    write_training(root)
    write_store(root)
    write_cache(root)


def write_corpus(root: Path) -> None:
    split = {"num_characters": 400_123, "tokens_by_source": {"numpy": 60_001, "python": 40_002}}
    sizes = {"train": (100_003, 57, 6.25), "validation": (5_113, 7, 6.125), "test": (5_227, 8, 6.0625)}
    splits = {
        name: {"num_tokens": tokens, "num_documents": documents, "unigram_entropy": entropy, **split}
        for name, (tokens, documents, entropy) in sizes.items()
    }
    tokenizer = {"kind": "bpe", "vocab_size": 300}
    metadata = {"corpus": "docs", "tokenizer": tokenizer, "vocab_size": 300, "padded_vocab_size": 320}
    write_json(root / "data/tokens/docs/metadata.json", {**metadata, "sources": ["numpy", "python"], "splits": splits})
    write_json(root / "data/raw/docs.source.json", {"packages": {"python": "3.11.77", "numpy": "2.4.66"}})


def write_training(root: Path) -> None:
    training = {
        **{"epochs": 2, "batch_size": 16, "micro_batch_size": 16, "lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 51},
        **{"betas": [0.9, 0.95], "weight_decay": 0.11, "clip_norm": 1.5, "precision": "fp32", "validate_every": 100},
        **{"checkpoint_every": 200, "early_stopping_patience": 3},
    }
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": LAYERS, "num_heads": 2, "num_experts": EXPERTS, "top_k": 2}
    config = {**sizes, "max_seq_len": 24, "dropout": 0.2, "capacity_factor": None}
    identity = {
        "dwr": {**config, "corpus": "docs", "balance_coefficient": 0.02, "training": training},
        "seed": 7,
        "device": "cpu",
        "num_threads": 2,
        "tokens": sha256(root / "data/tokens/docs/metadata.json"),
    }
    folder = root / "data/dwr/train"
    write_json(folder / "run.json", {"run": RUN, "config": {**config, "vocab_size": 320}, "identity": identity})
    (folder / "best.safetensors").write_bytes(bytes(3 * 1024))
    (folder / "last.safetensors").write_bytes(bytes(9 * 1024))
    losses = [(0, "", 5.8), (100, 5.0123, 4.5123), (200, 4.1123, 4.0523), (260, 3.9123, 4.0323)]
    curve = [
        {
            **{"step": step, "epoch": step / 130, "tokens": step * 384, "lr": 0.001, "validation_loss": validation},
            **{f"validation_balance_layer{layer}": 1.01 + layer / 100 for layer in range(LAYERS)},
            **{f"train_balance_loss_layer{layer}": 2.02 + layer / 100 if step else "" for layer in range(LAYERS)},
            **{
                "train_dropped_share": 0.0 if step else "",
                "train_gradient_norm": 0.9 if step else "",
                "train_loss": train,
            },
        }
        for step, train, validation in losses
    ]
    write_csv(root / "reports/dwr/training.csv", curve)
    norms = [[0.50, 0.51, 0.52, 0.53], [0.50, 0.52, 0.54, 0.57], [0.40, 0.50, 0.60, 0.71]]
    loads = [[0.25, 0.25, 0.25, 0.25], [0.20, 0.30, 0.25, 0.25], [0.10, 0.20, 0.30, 0.40]]
    router = [
        {"layer": layer, "expert": expert, "gate_norm": norm, "load": load, "mean_probability": load}
        for layer in range(LAYERS)
        for expert, (norm, load) in enumerate(zip(norms[layer], loads[layer], strict=True))
    ]
    write_csv(root / "reports/dwr/router.csv", router)
    summary = {
        **{"run": RUN, "parameters": 60_123, "active_parameters": 40_321, "training_tokens": 100_003, "steps": 260},
        **{"steps_planned": 260, "steps_per_epoch": 130, "stopped_early": False, "best_step": 260},
        **{"best_validation_loss": 4.0323, "final_validation_loss": 4.0323, "test_loss": 4.1717},
        **{"validation_unigram_entropy": 6.125, "precision": "fp32", "checks": {"gradient_reaches_every_router": True}},
    }
    write_json(root / "reports/dwr/training.json", summary)
    machine = {"processor": "A Processor 9000", "threads": 2, "python": "3.11.77", "torch": "2.9.99"}
    timing = {"seconds": 321.0, "tokens_per_second": 12_345.6, "peak_memory_bytes": 700 * 2**20, "machine": machine}
    write_json(root / "reports/dwr/training_timing.json", timing)


def write_store(root: Path) -> None:
    checks = {"every_file_has_its_sha256": True, "reassembled_logits_are_equal": True}
    sizes = {"expert_files": LAYERS * EXPERTS, "expert_file_bytes": 16_707, "backbone_file_bytes": 123_456}
    write_json(root / "reports/dwr/export.json", {"run": RUN, **sizes, "total_bytes": 323_940, "checks": checks})


def write_cache(root: Path) -> None:
    cells = [(capacity, warm) for capacity in (1, 4, 12) for warm in (False, True)]
    rows = [
        {
            **{"capacity": capacity, "warm_start": warm, "prefill_hit_rate": 0.1, "decode_hit_rate": capacity / 13},
            **{"evictions": 100 - capacity, "bytes_read": 1000 * (13 - capacity)},
        }
        for capacity, warm in cells
    ]
    write_csv(root / "reports/dwr/cache.csv", rows)
    checks = {"logits_are_equal_at_every_capacity": True}
    sizes = {"prompts": 5, "prompt_tokens": 9, "new_tokens": 13, "capacity_nearest_a_third": 4}
    write_json(root / "reports/dwr/cache.json", {"run": RUN, **sizes, "checks": checks})
    timing = [
        {
            **{"capacity": capacity, "warm_start": warm, "tokens_per_second": 400 + number},
            **{
                "tokens_per_second_lowest": 390,
                "tokens_per_second_highest": 460,
                "ratio_to_resident": 1 - number / 100,
            },
            **{"ratio_lowest": 0.61, "ratio_highest": 1.31, "prefill_seconds": 0.0456},
            **{"peak_memory_bytes": 210 * 2**20, "peak_anonymous_bytes": 160 * 2**20},
            **{"peak_file_backed_bytes": 50 * 2**20, "peak_mapped_expert_bytes": number * 2**20},
        }
        for number, (capacity, warm) in enumerate([("", ""), *cells])
    ]
    write_csv(root / "reports/dwr/cache_timing.csv", timing)
    summary = {
        **{"run": RUN, "repeats": 3, "at_a_third_of_the_experts": {"capacity": 4, "ratio_to_resident": 0.97}},
        **{"checks": {"memory_is_bounded": True}, "machine": {"processor": "Another Processor", "threads": 2}},
    }
    write_json(root / "reports/dwr/cache_timing.json", summary)


def edit_json(path: str | Path, change: Callable[[dict], None]) -> None:
    """Lets `change` alter what a JSON file holds."""
    data = json.loads(Path(path).read_text())
    change(data)
    write_json(path, data)


def edit_csv(path: str | Path, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> None:
    """Lets `change` alter what a CSV file holds, or return something else."""
    table = pd.read_csv(path)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)


def edit_yaml(path: str | Path, change: Callable[[dict], None]) -> None:
    """Lets `change` alter what a YAML file holds."""
    data = read_yaml(path)
    change(data)
    Path(path).write_text(json.dumps(data))  # JSON is YAML
