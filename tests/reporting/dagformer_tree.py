"""A tree of files as the DAGFormer stages write them, made up, for reports to be made from."""

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from repository import REPOSITORY

from dynaroute.analysis.statistics import paired_difference, verdict
from dynaroute.config import Settings, load_settings
from dynaroute.pipeline.artifacts import write_csv, write_json
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
    splits = {"train": split, "validation": split, "test": {**split, "num_tokens": 5_227, "share_in_train": 0.0321}}
    write_json(root / "data/tokens/docs/metadata.json", {**tokens, "splits": splits})
    write_base(root, layers, heads)
    for index, name in enumerate(settings.variants):
        write_variant(root, settings, name, index, layers, heads, windows)
    write_analyses(root, settings, layers, heads, windows)


def write_base(root: Path, layers: int, heads: int) -> None:
    sizes = {"num_layers": layers, "num_heads": heads, "hidden_size": 32, "vocab_size": 320, "parameters": 60_123}
    base = {"run": "ba5e", "kind": "pretrain", **sizes, "validation_loss": 3.3131, "unigram_entropy": 6.1717, "n": 32}
    nll = {"nll_all_gates_one": 3.3232, "nll_all_gates_zero": 4.1234}
    nll["zero_minus_one"] = {"mean": 0.8002, "low": 0.7001, "high": 0.9003, "n": 32, "verdict": "worse"}
    checks = {"removing_all_head_connections_raises_nll": True}
    write_json(root / "reports/dagformer/base.json", {**base, **nll, "checks": checks})
    timing = {"training_seconds": 123.0, "peak_memory_bytes": 600 * 2**20, "machine": MACHINE}
    write_json(root / "reports/dagformer_measured/base.json", timing)


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
        "dagformer": settings.dagformer.model_dump(
            include={"corpus", "seq_len", "train_windows", "validation_windows"}
        ),
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
    write_json(root / f"reports/dagformer_measured/{name}.json", timing)
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
    topology |= {
        "cascade_k": 5.0 + index,
        "entropy_bits": 0.1234 + index / 1000,
        "dead_heads": index,
        "mute_heads": index,
        "deaf_heads": 0,
    }
    if name in ("J1", "J0"):
        topology["nll_own_base"] = 3.3 + index / 1000
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


# --- what the analysis stages leave --------------------------------------------------------------------------------


def write_analyses(root: Path, settings: Settings, layers: int, heads: int, windows: int) -> None:
    """Writes the analyses of the wirings that the settings name, of the base, and of all differences."""
    for index, name in enumerate(settings.analysis.variants):
        write_topology(root, name, index, layers, heads, windows)
    write_sensitivity(root, layers, heads)
    write_comparisons(root, settings)


def comparison(mean: float, p: float = 0.0123) -> dict:
    margin = 0.0042
    found = {"mean": mean, "low": mean - margin, "high": mean + margin, "n": 37, "bootstrap_low": mean - 0.0051}
    found |= {"bootstrap_high": mean + 0.0052, "groups": 19, "p": p, "effect_size": mean * 10, "detectable": 0.0061}
    return found


def chance(observed: float, p: float, expected: float = 0.0) -> dict:
    return {"observed": observed, "chance": expected, "p": p}


def write_topology(root: Path, name: str, index: int, layers: int, heads: int, windows: int) -> None:
    """P1 follows the text and its domain, the second variant varies without, the third (C1) does not vary."""
    p, scale = ((0.0004, 1.0), (0.31, 0.5), (1.0, 0.0))[min(index, 2)]
    varied = {"gate_variance": 0.01234 * scale, "distance_mean": 0.1357 * scale, "distance_variance": 0.00246 * scale}
    varied |= {
        "entropy_bits": 0.2468,
        "information_bits": 0.0789 * scale,
        "effective_rank": 7.7 * scale,
        "distinct": windows if scale else 1,
    }
    tests = {mode: chance(0.0654 * scale, p, 0.0002 * scale) for mode in MODES[:2]}
    pairs = [
        {
            "source": source,
            "target": target,
            **chance(0.31 * scale / (1 + target), p, 0.11 * scale),
            "means": [0.6, 0.7],
        }
        for source in range(layers)
        for target in range(source + 1, layers)
    ]
    for pair in pairs:
        pair["explained"], pair["p_holm"] = pair.pop("observed"), min(1.0, pair["p"] * len(pairs))
    domains = {"sources": ["numpy", "python"], "windows_per_source": 21, "documents": [5, 6]}
    for mode in MODES[:2]:
        distances = [[0.11 * scale, 0.22 * scale], [0.22 * scale, 0.12 * scale]]
        domains[mode] = {"separation": chance(0.0321 * scale, p, 0.0003 * scale), "mean_distances": distances}
    domains |= {"probe": chance(0.5 + 0.4 * scale, p, 0.49), "text_probe": chance(0.97, 0.0004, 0.48)}
    domains["layer_pairs"] = pairs
    report = {
        "run": f"{name.lower()}0123456789abcd",
        "variant": name,
        "n": windows,
        "variation": {protocol: {mode: varied for mode in MODES[:2]} for protocol in ("window", "prefix")},
        "same_text": tests,
        "swapped": {"window": comparison(-0.0081 * scale), "prefix": comparison(-0.0005 * scale, 0.4)},
        "reading": {
            mode: {
                "read": comparison(0.021),
                "not_read": comparison(0.021 + 0.0066 * scale),
                "read_minus_not_read": comparison(-0.0066 * scale),
            }
            for mode in MODES[:2]
        },
        "domains": domains,
        "checks": {"wirings_are_those_that_were_evaluated": True},
    }
    write_json(root / "reports/dagformer" / name / "topology.json", report)
    write_wirings(root / "data/analysis" / name, index, layers, heads, windows)


def write_wirings(folder: Path, index: int, layers: int = LAYERS, heads: int = HEADS, windows: int = WINDOWS) -> None:
    generator, nodes = torch.Generator().manual_seed(index), layers * heads
    tensors = {
        "variance": 0.1 * torch.rand(nodes, nodes, generator=generator),
        "distances": torch.rand(windows * (windows - 1) // 2, generator=generator),
        "same_text": 0.3 * torch.rand(windows, generator=generator),
        "mean_by_source": torch.rand(2, nodes, nodes, generator=generator),
    }
    save_checkpoint(folder / "wirings.safetensors", tensors, {"sources": ["numpy", "python"], "num_heads": heads})


def change_of(difference: float, p: float = 0.5) -> dict:
    found = {"difference": difference, "low": difference - 0.003, "high": difference + 0.003, "n": 13, "documents": 11}
    return found | {"p_corrected": p, "detectable": 0.0123}


def write_sensitivity(root: Path, layers: int, heads: int) -> None:
    folder = root / "reports/dagformer"
    pairs = [(source, target) for source in range(layers) for target in range(source + 1, layers)]
    shape = {"n": 53, "documents": 17, "gates": len(pairs) * heads**2, "size": 4.14e-4, "size_of_mean": 7.27e-5}
    shape |= {"size_by_chance": 6.9e-5, "p": 0.237, "helpful": 0.0, "harmful": 0.0, "sign_consistency": 0.123}
    counts = {"better": 0, "worse": 2, "no_difference_shown": len(pairs) - 2, "detectable": 0.0234}
    oracle = {"same": -0.2717, "next": 0.022, "other": 0.0357}
    summary = {
        "base": "b" * 64,
        "num_layers": layers,
        "num_heads": heads,
        "flatness": {**shape, "sign_consistency_by_chance": 0.101, "slopes": False},
        "adjacent_minus_skip": {**comparison(1.7e-4, 0.0002), "adjacent": 5.4e-4, "skip": 3.7e-4},
        "removal": {
            "n": 13,
            "orders": [
                {"order": order, "fraction": fraction, **change_of(0.01 * fraction)}
                for order in ("least_gradient", "expected_gain")
                for fraction in (0.1, 0.5)
            ],
            "layer_pairs": counts,
            "heads": {**counts, "no_difference_shown": layers * heads - 2},
        },
        "oracle": {"steps": 33, "lr": 0.05, "carried_over": {"mean": -0.08, "low": -0.2, "high": 0.1, "n": 9}}
        | {text: change_of(mean, 0.002 if text == "same" else 0.5) for text, mean in oracle.items()},
        "checks": {"gradients_and_removals_are_of_different_documents": True},
    }
    write_json(folder / "sensitivity.json", summary)
    gradient = {
        "gates": heads**2,
        "mean": 1e-5,
        "spread": 5e-4,
        "sign_consistency": 0.12,
        "helpful": 0.0,
        "harmful": 0.0,
    }
    rows = [{"source": s, "target": t, **gradient, "size": 1e-4 * (s + 1)} for s, t in pairs]
    write_csv(folder / "gate_gradients.csv", rows)
    write_csv(
        folder / "removal.csv",
        [
            {"order": order, "fraction": fraction, "draws": 3, **change_of(rise * fraction, 0.01)}
            for order, rise in (("random", 0.15), ("least_gradient", 0.1), ("expected_gain", 0.2))
            for fraction in (0.1, 0.5, 1.0)
        ],
    )
    rows = [{"source": s, "target": t, **change_of(0.01 * (t - s), 0.02 * (s + 1))} for s, t in pairs]
    write_csv(folder / "removal_layer_pairs.csv", rows)
    nodes = [(layer, head) for layer in range(layers) for head in range(heads)]
    rows = [{"layer": one, "head": h, **change_of(0.001 * (one + h), 1.0)} for one, h in nodes]
    write_csv(folder / "removal_heads.csv", rows)


def write_comparisons(root: Path, settings: Settings) -> None:
    names = list(settings.variants)
    members = {"baseline": [(name, "baseline") for name in names]}
    seeds = [name for name in names if name in ("P1", "P1s1", "P1s2")]
    pools = {"frozen base": [name for name in names if name not in ("J1", "J0")], "P1 over seeds": seeds}
    members["direction"] = [(name, "baseline") for name, pooled in pools.items() if len(pooled) > 1]
    others = ("S1", "P1", "P1s1", "P1s2", "C1", "J1", "J0")
    members["reference"] = [(name, "P1") for name in names if name not in others]
    members["control"] = [("P1", "C1")] if "C1" in names else []
    members["joint"] = [("J1", "J0")] if {"J1", "J0"} <= set(names) else []
    rows = []
    for family, pairs in members.items():
        for index, (ours, theirs) in enumerate(pairs):
            for protocol in ("window", "prefix"):
                for mode in MODES[:2]:
                    row = {"family": family, "ours": ours, "theirs": theirs, "protocol": protocol, "mode": mode}
                    row |= comparison(0.0105 + index / 1000)
                    row |= {"p_corrected": 0.0321 if index < 3 else 0.5, "p_error": 0.00123}
                    rows.append(row | {"verdict": _verdict(index)})
    write_csv(root / "reports/statistics/comparisons.csv", rows)
    found = {"seeds": {name: settings.variant(name).seed for name in seeds}}
    if len(seeds) > 1:
        for protocol in ("window", "prefix"):
            differences = {name: 0.0111 + index / 500 for index, name in enumerate(seeds)}
            over = {"mean": 0.0131, "low": 0.0081, "high": 0.0181, "n": len(seeds)}
            found[protocol] = {mode: {"differences": differences, "spread": 0.002, **over} for mode in MODES[:2]}
    write_json(root / "reports/statistics/seeds.json", found)


def _verdict(index: int) -> str:
    return "worse" if index < 3 else "no difference shown"
