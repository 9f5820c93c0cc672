"""A tree of files as the stages write them, small and made up, for reports to be made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from repository import REPOSITORY

from dynaroute.config import Settings, read_yaml
from dynaroute.pipeline.artifacts import sha256, write_csv, write_json

RUN = "0123456789abcdef"
LAYERS, EXPERTS = 3, 4
RUNS = {
    "more_text": ({"train_windows": 640, "training": {"epochs": 5.0}}, 5.25, 0.25),
    "reference": ({}, 5.0, 0.3),
    "strong": ({"balance_coefficient": 0.5}, 5.125, 0.28),
    "none": ({"balance_coefficient": 0.0, "training": {"early_stopping_patience": 2}}, 5.0625, 0.45),
    "seed_1": ({"seed": 1}, 5.0, 0.32),
    "seed_2": ({"seed": 2}, 5.0, 0.34),
}  # overrides, test loss, hit rate
SPREADS = {"reference": (0.1, 0.2, 0.3), "seed_1": (0.1, 0.3, 0.4), "seed_2": (0.2, 0.3, 0.5)}  # by layer, at the end
LOSSES = [(None, 7.5), (6.5, 6.25), (5.5, 5.0625), (4.5, 5.125), (3.5, 5.3125)]  # by epoch: training, validation


def write_tree(root: Path) -> None:
    """Writes everything that the DWR reports read."""
    (root / "reports").mkdir()
    shutil.copy(REPOSITORY / "reports/reference.yaml", root / "reports")
    for write in (
        write_corpus,
        write_training,
        write_store,
        write_cache,
        write_simulation,
        write_benchmarks,
        write_runs,
    ):
        write(root)


def write_corpus(root: Path) -> None:
    split = {"num_characters": 400_123, "tokens_by_source": {"code": 60_001, "prose": 40_002}}
    sizes = {"train": (100_003, 57, 6.25), "validation": (5_113, 7, 6.125), "test": (5_227, 8, 6.0625)}
    splits = {
        name: {"num_tokens": tokens, "num_documents": documents, "unigram_entropy": entropy, **split}
        for name, (tokens, documents, entropy) in sizes.items()
    }
    tokenizer = {"kind": "bpe", "vocab_size": 300}
    metadata = {"corpus": "docs", "tokenizer": tokenizer, "vocab_size": 300, "padded_vocab_size": 320}
    write_json(root / "data/tokens/docs/metadata.json", {**metadata, "sources": ["code", "prose"], "splits": splits})
    write_json(root / "data/inputs/corpora.docs.source.json", {"packages": {"numpy": "2.4.66", "pandas": "3.1.77"}})


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
        **{"best_validation_loss": 4.0323, "test_loss": 4.1717},
        **{"validation_unigram_entropy": 6.125, "precision": "fp32", "checks": {"gradient_reaches_every_router": True}},
    }
    write_json(root / "data/dwr/train/summary.json", summary)
    machine = {"processor": "A Processor 9000", "threads": 2, "python": "3.11.77", "torch": "2.9.99"}
    timing = {"seconds": 321.0, "tokens_per_second": 12_345.6, "peak_memory_bytes": 700 * 2**20, "machine": machine}
    write_json(root / "data/dwr/measured/training.json", timing)


def write_store(root: Path) -> None:
    checks = {"every_file_has_its_sha256": True, "reassembled_logits_are_equal": True}
    sizes = {"expert_files": LAYERS * EXPERTS, "expert_bytes": 16_500, "expert_file_bytes": 16_707}
    sizes |= {"backbone_file_bytes": 123_456}
    precisions = [("fp32", 12_345, 4.0111), ("bf16", 6_345, 4.0115), ("int8", 3_345, 4.0177)]
    columns = ("precision", "expert_bytes", "nll")
    lower = {
        "precision": "fp32",
        "precisions": [dict(zip(columns, row, strict=True)) for row in precisions],
        "calibration_windows": 19,
    }
    record = {"run": RUN, **sizes, **lower, "total_bytes": 323_940, "checks": checks}
    write_json(root / "data/dwr/export/summary.json", record)


def write_cache(root: Path) -> None:
    cells = [
        (capacity, policy, prefetch)
        for capacity in (1, 4, 12)
        for policy in ("lru", "next_use")
        for prefetch in ("none", "gate")
    ]
    rows = [
        {
            **{"capacity": capacity, "policy": policy, "prefetch": prefetch, "prefill_hit_rate": 0.1},
            **{"decode_hit_rate": capacity / 13 + (policy == "next_use") / 100, "evictions": 100 - capacity},
            **{"misses": 13 - capacity, "accuracy": 0.765 if prefetch == "gate" else ""},
            **{"prefetched": 5, "prefetch_evictions": 17},
        }
        for capacity, policy, prefetch in cells
    ]
    write_csv(root / "data/dwr/cache/cells.csv", rows)
    checks = {"logits_are_equal_in_every_cell": True}
    sizes = {"prompts": 5, "prompt_tokens": 9, "new_tokens": 13, "capacity_nearest_a_third": 4, "lookahead": 2}
    sizes |= {"experts": LAYERS * EXPERTS, "expert_file_bytes": 16_707}
    write_json(root / "data/dwr/cache/summary.json", {"run": RUN, **sizes, "checks": checks})
    timing = [
        {
            **{"capacity": cell[0], "policy": cell[1], "prefetch": cell[2], "page_cache": cell[0] and "warm"},
            **{"tokens_per_second": 400 + number, "tokens_per_second_lowest": 390, "tokens_per_second_highest": 460},
            **{"ratio_to_resident": 1 - number / 100, "ratio_lowest": 0.61, "ratio_highest": 1.31},
            **{"wait_share": 0.125, "prefill_seconds": 0.0456, "bytes_read": 9000 + number, "bytes_read_ahead": 500},
            **{"bytes_useful": 400, "bytes_late": 321, "bytes_wasted": 100},
            **{"peak_memory_bytes": 210 * 2**20, "peak_anonymous_bytes": 160 * 2**20},
            **{"peak_mapped_expert_bytes": number * 2**20},
        }
        for number, cell in enumerate([("", "", ""), *cells])
    ]
    write_csv(root / "data/dwr/measured/cache/cells.csv", timing)
    summary = {"run": RUN, "repeats": 3, "checks": {"memory_is_bounded": True}}
    summary |= {"machine": {"processor": "Another Processor", "threads": 2}}
    write_json(root / "data/dwr/measured/cache/summary.json", summary)


def write_simulation(root: Path) -> None:
    rates, uniform = ({"lru": a, "next_use": b, "min": c} for a, b, c in ((0.3011, 0.4222, 0.6033), (0.2, 0.32, 0.58)))
    hits = [
        {
            **{"capacity": capacity, "policy": policy, "per_layer": per_layer, "hit_rate": rate * capacity / 4},
            **{"uniform_hit_rate": uniform[policy] * capacity / 4},
        }
        for per_layer, capacities in ((False, (2, 4, 6)), (True, (4,)))
        for capacity in capacities
        for policy, rate in rates.items()
    ]
    write_csv(root / "reports/dwr/simulated_hits.csv", hits)
    speeds = [
        {
            **{"machine": machine, "model": "seed", "capacity": capacity, "policy": "next_use", "prefetch": prefetch},
            **{"hit_rate": 0.5, "accuracy": 0.654 if prefetch == "gate" else "", "selective": selective},
            **{"ratio_to_resident": 0.1 * number + 0.0123 + (0.3 if machine == "disk" else 0)},
        }
        for machine in ("disk", "pcie")
        for number, (capacity, prefetch, selective) in enumerate(
            [
                *((4, "none", False), (4, "gate", False), (4, "gate", True), (2, "none", False)),
                *((2, "gate", False), (2, "gate", True), (6, "gate", True), (6, "gate", False), (6, "none", False)),
            ]
        )
    ]
    write_csv(root / "data/dwr/simulation/speed.csv", speeds)
    record = {"run": RUN, "tokens": 2_345, "capacity_nearest_a_third": 4, "hit_rate": rates}
    record |= {"checks": {"min_is_best": True}}
    write_json(root / "data/dwr/simulation/summary.json", record)


def write_benchmarks(root: Path) -> None:
    """What the default pipeline does not run."""
    row = {"name": "ours, shards", "precision": "bf16", "threads": 1, "limit_bytes": 5 * 2**30, "hit_rate": 0.3456}
    row |= {"read_bytes": 3 * 2**20, "cold": 1.234, "warm": 3.456, "lowest": 2.5, "highest": 4.5, "ratio": 1.0}
    row |= {"share": 0.456, "bound_by": "disk", "memory_bytes": 5 * 2**30}
    other = {**row, "name": "resident", "limit_bytes": None, "hit_rate": None, "warm": 6.543, "bound_by": "memory"}
    missing = {"name": "llama.cpp", "precision": "int8", "threads": 1, "limit_bytes": None, "note": "not installed"}
    goals = [
        {"page_cache": state, "name": "ours, shards", "against": "resident", "value": value, "goal": goal}
        | {"lowest": value / 2, "highest": value * 2}
        for state, value, goal in (("warm", 0.528, 0.5), ("warm", 8.765, 10.0), ("cold", 0.312, 1.0))
    ]
    peers = {"experts": 1024, "experts_per_token": 128, "model_bytes": 13_837_000_000, "tokens": {"cold": 4}}
    peers["tokens"]["warm_up"] = 24
    peers |= {"limited": True, "memory_bandwidth": 10 * 2**30, "disk_bandwidth": 2**30, "goals": goals}
    peers |= {"machine": {"processor": "A Third Processor"}, "rows": [row, other, missing]}
    write_json(root / "reports/benchmarks/hub_moe.json", peers)
    layer = {"milliseconds": 12.3, "interquartile_milliseconds": 1.5, "ratio_to_dense": 1.67}
    model = {"parameters": 4_321, "milliseconds": 45.6, "tokens_per_second": 9_876.5}
    training = {"tokens_per_step": 2_048, "precision": "fp32", "models": {"plain_loop": model}}
    training["tokens_per_second_ratios"] = {"dynaroute_to_dense": {"ratio": 0.857, "quartiles": [0.78, 0.9]}}
    moe = {"sizes": {"d_model": 512, "d_ff": 2048, "num_experts": 16, "top_k": 2}, "training": training}
    moe |= {"rows": [{"tokens": 8192, "layer": "dynaroute", **layer}], "machine": {"processor": "Bench 1"}}
    write_json(root / "reports/benchmarks/moe.json", moe)


def write_runs(root: Path) -> None:
    """The results of small runs: overrides, test loss and hit rate of each are made up."""
    settings = settings_with_runs()
    for number, (name, (_, loss, rate)) in enumerate(RUNS.items()):
        knobs = settings.dwr_run(name)
        steps = 40 if knobs.training.early_stopping_patience is None else 30
        spreads = SPREADS.get(name, SPREADS["reference"])
        record = {
            **{"name": name, "run": f"{number}", "settings": knobs.model_dump()},
            **{"parameters": 870_560 + number, "training_tokens": 8_192, "best_epoch": 2.0},
            **{"steps": steps, "steps_planned": 40, "epochs": steps / 10},
            **{"validation_loss": 5.0625, "test_loss": loss, "test_unigram_entropy": 6.2},
            **{"smallest_load": 0.25, "largest_load": 1.75, "experts": 24, "capacity": 8, "trace_tokens": 1_536},
            "hit_rate": {"lru": rate, "next_use": rate + 0.1, "min": rate + 0.3},
            "uniform_hit_rate": {"lru": 0.26, "next_use": 0.34, "min": 0.61},
            "losses": [{"step": step, "train_loss": 7.0 - step / 10} for step in range(1, steps, 10)],
            "history": [
                {
                    **{"step": 10 * epoch, "epoch": float(epoch), "lr": 0.0 if train is None else 0.004},
                    **{"validation_loss": validation} | ({} if train is None else {"train_loss": train}),
                    **({} if train is None else {"train_gradient_norm": 0.9}),
                    **{f"validation_balance_layer{layer}": 1.01 + layer / 100 for layer in range(LAYERS)},
                    **{f"validation_gate_norm_min_layer{layer}": 0.15 for layer in range(LAYERS)},
                    **{f"validation_gate_norm_mean_layer{layer}": 0.17 for layer in range(LAYERS)},
                    **{
                        f"validation_gate_norm_max_layer{layer}": 0.15 + spread * epoch / 4
                        for layer, spread in enumerate(spreads)
                    },
                }
                for epoch, (train, validation) in enumerate(LOSSES[: steps // 10 + 1])
            ],
        }
        write_json(root / f"data/dwr/run_results/{name}.json", record)


def settings_with_runs() -> Settings:
    """The default settings with the runs that `write_runs` writes."""
    params = read_yaml(REPOSITORY / "params.yaml")
    windows = {"train_windows": 64, "validation_windows": 32, "eval_windows": None}
    params["dwr_runs"] = {name: {"corpus": "docs", **overrides} for name, (overrides, *_) in RUNS.items()}
    params["dwr_runs"]["reference"] |= {
        **windows,
        "num_layers": LAYERS,
        "balance_coefficient": 0.01,
        "training": {"epochs": 4.0, "early_stopping_patience": None},
    }
    return Settings.model_validate(params)


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
