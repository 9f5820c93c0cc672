"""A tree of files as the DAGFormer stages write them, made up, for reports to be made from."""

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from repository import REPOSITORY

from dynaroute.artifacts import write_csv, write_json
from dynaroute.config import Settings, load_settings
from dynaroute.evaluation.statistics import paired_difference, verdict
from dynaroute.training.checkpoints import save_checkpoint

MACHINE = {"processor": "A Processor 9000", "threads": 2, "torch": "2.9.99"}
BASELINE = 3.4567
MODES = ("soft", "hard", "baseline")
# How far a variant ends from the baseline in soft and hard mode; the others, as P1.
ENDS = {"S1": (0.001, 0.002), "S2": (-0.02, -0.015), "P1": (0.012, 0.0345), "L0": (0.11, 2.1)}


LAYERS, HEADS, WINDOWS = 4, 3, 12


def write_dagformer_tree(root: Path, layers: int = LAYERS, heads: int = HEADS, windows: int = WINDOWS) -> None:
    """Writes everything that the DAGFormer reports read, for the variants of the repository's params.yaml."""
    (root / "reports").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "reports/reference.yaml", root / "reports")
    shutil.copy(REPOSITORY / "params.yaml", root)
    settings = load_settings(root / "params.yaml")
    split = {"num_tokens": 100_003, "num_documents": 57, "unigram_entropy": 6.25}
    tokens = {"corpus": "docs", "tokenizer": {"kind": "bpe"}, "vocab_size": 300, "sources": ["numpy", "python"]}
    splits = {"train": split, "validation": split, "test": {**split, "num_tokens": 5_227}}
    write_json(root / "data/tokens/docs/metadata.json", {**tokens, "splits": splits})
    write_base(root, layers, heads)
    for index, name in enumerate(settings.variants):
        write_variant(root, settings, name, index, layers, heads, windows)


def write_base(root: Path, layers: int, heads: int) -> None:
    sizes = {"num_layers": layers, "num_heads": heads, "hidden_size": 32, "vocab_size": 320, "parameters": 60_123}
    base = {"run": "ba5e", "kind": "pretrain", **sizes, "validation_loss": 3.3131, "unigram_entropy": 6.1717, "n": 32}
    nll = {"nll_all_gates_one": 3.3232, "nll_all_gates_zero": 4.1234}
    checks = {"removing_all_head_connections_raises_nll": True}
    write_json(root / "reports/dagformer/base.json", {**base, **nll, "checks": checks})
    timing = {"training_seconds": 123.0, "peak_memory_bytes": 600 * 2**20, "machine": MACHINE}
    write_json(root / "reports/dagformer/base_timing.json", timing)


def write_variant(
    root: Path,
    settings: Settings,
    name: str,
    index: int,
    layers: int = LAYERS,
    heads: int = HEADS,
    windows: int = WINDOWS,
) -> None:
    """Writes what training and evaluation leave of one variant; `index` makes its numbers its own."""
    knobs, start = settings.variant(name), settings.variants[name]["from"]
    run = f"{name.lower()}0123456789abcd"
    reports = root / "reports/dagformer" / name
    identity = {
        "variant": knobs.model_dump(),
        "dagformer": settings.dagformer.model_dump(),
        "device": "cpu",
        "num_threads": 2,
        "base": "b" * 64,
        "embeddings": "e" * 64,
        "start": None if start == "base" else "c" * 64,
    }
    sizes = {"num_layers": layers, "num_heads": heads, "embedding_size": 32}
    description = {"run": run, "variant": name, "from": start, "knobs": knobs.model_dump(), **sizes}
    write_json(root / "data/dagformer" / name / "run.json", {**description, "identity": identity})
    soft, hard = ENDS.get(name, tuple(value + index / 5000 for value in ENDS["P1"]))
    curve = [
        curve_row(step, knobs.steps, knobs.model_dump(), soft, hard)
        for step in range(0, knobs.steps + 1, knobs.validate_every)
    ]
    write_csv(reports / "training.csv", curve)
    checks = {"base_is_unchanged_to_the_bit": True, "base_holds_no_gradients": True}
    health = {"verdict": "healthy", "verdict_reason": "slope and density stayed above their alarm thresholds"}
    summary = {"run": run, "variant": name, "steps": knobs.steps, "tokens": curve[-1]["tokens"], **health}
    write_json(reports / "training.json", {**summary, "predictor_parameters": 45_678 + index, "checks": checks})
    timing = {"seconds": 40.0 + index, "seconds_per_step": 0.25, "validation_seconds": 2.5, "loading_seconds": 3.5}
    timing |= {"peak_memory_bytes": (700 + index) * 2**20, "machine": MACHINE}
    write_json(reports / "training_timing.json", timing)
    write_evaluation(root, name, run, index, soft, hard, windows)
    write_gates(root / "data/eval" / name, index, layers, heads)


def curve_row(step: int, steps: int, knobs: dict, soft: float, hard: float) -> dict:
    part = step / steps
    tau = knobs["tau_final"] + (knobs["tau_init"] - knobs["tau_final"]) * 0.5 * (1 + math.cos(math.pi * part))
    weight = knobs["lambda_init"] + (knobs["lambda_final"] - knobs["lambda_init"]) * min(1, part * 5)
    row = {"step": step, "epoch": step / 256, "tokens": step * 1024, "lr": 0.001, "validation_loss": 3.0}
    row |= {"validation_nll_soft": 3.3232 + soft * part, "validation_nll_hard": 3.3232 + hard * part}
    row |= {"validation_nll_baseline": 3.3232, "validation_mean_A": 0.95 - 0.2 * part}
    row |= {"validation_density_hard": 1 - 0.3 * part, "validation_seq_gate_frac": 1 - 0.1 * part}
    row |= {"validation_hyp_gate_frac": 1 - 0.35 * part, "validation_tau": tau, "validation_lambda": weight}
    row |= {"train_loss": 3.1919 if step else "", "train_mean_A": 0.9 - 0.1 * part if step else ""}
    return row | {
        "train_gate_gradient": 0.0123 * tau if step else "",
        "train_gate_slope": 0.05 * math.exp(-3 / tau) if step else "",
        "train_gradient_norm": 0.5 if step else "",
    }


def write_evaluation(root: Path, name: str, run: str, index: int, soft: float, hard: float, windows: int) -> None:
    rng = np.random.default_rng(index)  # noise of the variant's own; the text's is shared
    rows = []
    for protocol, tokens, text in (
        ("window", 23, np.random.default_rng(99)),
        ("prefix", 11, np.random.default_rng(98)),
    ):
        for window in range(windows):
            baseline = BASELINE + float(text.normal(0, 0.3))
            noise = rng.normal(0, 0.004, 2)
            nll = {"nll_soft": baseline + soft + noise[0], "nll_hard": baseline + hard + noise[1]}
            row = {"protocol": protocol, "window": window, "source": ("numpy", "python")[window % 2], "tokens": tokens}
            rows.append({**row, **nll, "nll_baseline": baseline})
    write_csv(root / "reports/dagformer" / name / "nll.csv", rows)
    topology = {"mean_A": 0.75, "density_hard": 0.71, "seq_gate_frac": 0.91, "hyp_gate_frac": 0.66}
    topology |= {"entropy_bits": 0.1234 + index / 1000, "dead_heads": index, "mute_heads": index, "deaf_heads": 0}
    protocols = {}
    for protocol in ("window", "prefix"):
        own = {mode: np.array([row[f"nll_{mode}"] for row in rows if row["protocol"] == protocol]) for mode in MODES}
        protocols[protocol] = {f"nll_{mode}": float(values.mean()) for mode, values in own.items()} | topology
        for mode in ("soft", "hard"):
            interval = paired_difference(own[mode], own["baseline"])
            protocols[protocol][f"{mode}_minus_baseline"] = {**interval._asdict(), "verdict": verdict(interval)}
    checks = {"baseline_is_the_loss_of_transformers": True}
    report = {"run": run, "variant": name, "n": windows, **protocols, "checks": checks}
    write_json(root / "reports/dagformer" / name / "nll.json", report)


def write_gates(folder: Path, index: int, layers: int = LAYERS, heads: int = HEADS) -> None:
    rng, nodes = np.random.default_rng(index), layers * heads
    layer = np.arange(nodes) // heads
    valid = layer[None, :] > layer[:, None]
    logits = rng.normal(3, 4, (nodes, nodes)) - 0.6 * (layer[None, :] - layer[:, None])
    soft = np.where(valid, 1 / (1 + np.exp(-logits)), 0).astype(np.float32)
    hard = np.where(valid, np.clip(logits / 4 + 0.5, 0, 1), 0).astype(np.float32)
    means = {"window.mean_soft": torch.from_numpy(soft), "window.mean_hard": torch.from_numpy(hard)}
    save_checkpoint(folder / "gates.safetensors", means, {"num_layers": layers, "num_heads": heads, "tau": 0.2})
