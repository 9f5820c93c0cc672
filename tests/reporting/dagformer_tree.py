"""A tree of files as the DAGFormer stages write them, made up, for reports to be made from."""

import shutil
from pathlib import Path

import compare_variants
import numpy as np
import torch
from repository import REPOSITORY

from dynaroute.config import Settings, load_settings
from dynaroute.config.dagformer import BASES, MODES, PROTOCOLS
from dynaroute.dagformer.gates import dag_mask
from dynaroute.pipeline.artifacts import write_csv, write_json
from dynaroute.training.checkpoints import save_checkpoint

MACHINE = {"processor": "A Processor 9000", "threads": 2}
BASELINE = 3.4567
# How far a variant ends from the baseline in soft and hard mode; the others, near P1.
ENDS = {"S1": (0.001, 0.002), "S2": (-0.02, -0.015), "P1": (0.012, 0.0345), "L0": (0.11, 2.1)}
ENDS |= {"planted_P1": (-0.4, -0.3), "planted_L0": (-0.1, 0.3), "planted_P1_open": (-1.9, -1.8)}
LAYERS, HEADS, WINDOWS = 4, 3, 24
DATA, TOKENS = Path("data/dagformer"), Path("data/tokens/docs")


def write_dagformer_tree(root: Path, layers: int = LAYERS, heads: int = HEADS) -> None:
    """Writes everything that the DAGFormer reports read, for the variants of the repository's params.yaml."""
    (root / "reports").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "reports/reference.yaml", root / "reports")
    shutil.copy(REPOSITORY / "params.yaml", root)
    settings = load_settings(root / "params.yaml")
    splits = {"train": {"num_tokens": 100_003}, "test": {"num_tokens": 5_227, "share_in_train": 0.0321}}
    write_json(root / TOKENS / "metadata.json", {"sources": ["numpy", "python"], "splits": splits})
    base = {"run": "ba5e", "num_layers": layers, "num_heads": heads, "hidden_size": 32, "vocab_size": 320, "n": 32}
    base |= {"parameters": 60_123, "unigram_entropy": 6.1717, "nll_all_gates_one": 3.3232}
    write_json(root / DATA / "base.json", base | {"checks": {"removing_all_head_connections_raises_nll": True}})
    timing = {"training_seconds": 123.0, "peak_memory_bytes": 600 * 2**20, "machine": MACHINE}
    for base in BASES:
        write_json(root / DATA / f"measured/{base}.json", timing)
    for index, name in enumerate(settings.variants):
        write_variant(root, settings, name, index, layers, heads)
    for name, scale in zip(settings.analysis.variants, (1.0, 0.5, 0.0), strict=True):  # C1 does not vary
        write_json(root / DATA / "analysis" / name / "topology.json", topology(name, scale, layers))
    write_planted(root / DATA, settings)
    write_sensitivity(root / DATA / "sensitivity", layers, heads)
    write_wirings(root, 0, layers, heads)


def write_comparisons() -> None:
    """What compare_variants makes of the files in the working directory."""
    compare_variants.main(load_settings())


def write_variant(root: Path, settings: Settings, name: str, index: int, layers: int, heads: int) -> None:
    """Writes what training and evaluation leave of one variant; `index` makes its numbers its own."""
    knobs, run, trained = settings.variant(name), f"{name}0123456789abcd", root / DATA / "train" / name
    shared = settings.dagformer.model_dump(include={"corpus", "seq_len", "train_windows", "validation_windows"})
    identity = {"dagformer": shared, "device": "cpu", "base": settings.base_of(name)[0] * 64}
    description = {"run": run, "from": settings.variants[name]["from"], "knobs": knobs.model_dump()}
    sizes = {"num_layers": layers, "num_heads": heads}
    write_json(trained / "run.json", description | sizes | {"identity": identity})
    soft, hard = ENDS.get(name, tuple(value + index / 5000 for value in ENDS["P1"]))
    steps = range(0, knobs.steps + 1, knobs.validate_every)
    write_csv(trained / "training.csv", [curve_row(step, step / knobs.steps, soft, hard) for step in steps])
    health = {"health": "healthy", "health_reason": "slope and density stayed above their alarm thresholds"}
    summary = {"run": run, "steps": knobs.steps, "tokens": 32_768, "predictor_parameters": 45_678 + index, **health}
    write_json(trained / "training.json", summary | {"checks": {"base_is_unchanged_to_the_bit": True}})
    timing = {"seconds": 40.0 + index, "seconds_per_step": 0.25, "validation_seconds": 2.5, "loading_seconds": 3.5}
    timing |= {"peak_memory_bytes": (700 + index) * 2**20, "machine": MACHINE}
    write_json(root / DATA / f"measured/{name}.json", timing)
    write_evaluation(root / DATA / "eval" / name, run, index, soft, hard)


def curve_row(step: int, part: float, soft: float, hard: float) -> dict:
    row = {"step": step, "tokens": step * 1024, "validation_nll_baseline": 3.3232, "validation_mean_A": 0.95 - part / 5}
    row |= {"validation_nll_soft": 3.3232 + soft * part, "validation_nll_hard": 3.3232 + hard * part}
    row |= {"validation_density_hard": 1 - 0.3 * part, "validation_tau": 5 - 4 * part, "validation_lambda": 0.01 * part}
    trained = {"train_loss": 3.1919, "train_gate_gradient": 0.0123 * (1 + part), "train_gate_slope": 0.05 * (2 - part)}
    return row | (trained if step else dict.fromkeys(trained, ""))


def write_evaluation(folder: Path, run: str, index: int, soft: float, hard: float) -> None:
    own, rows = np.random.default_rng(index), []  # noise of the variant's own; the text's is shared
    report = {"run": run, "n": WINDOWS, "checks": {"a_batch_scored_again_gives_the_same_bits": True}}
    for protocol, text in zip(PROTOCOLS, (np.random.default_rng(99), np.random.default_rng(98)), strict=True):
        for window in range(WINDOWS):
            baseline, noise = BASELINE + float(text.normal(0, 0.3)), own.normal(0, 0.004, 4)
            row = {
                "protocol": protocol,
                "window": window,
                "document": window // 2,
                "source": ("numpy", "python")[window // 2 % 2],
            }
            row |= {"nll_soft": baseline + soft + noise[0], "nll_hard": baseline + hard + noise[1]}
            row |= {"nll_random": baseline + noise[2], "nll_least_gradient": baseline - 0.02 + noise[3]}
            rows.append(row | {"nll_baseline": baseline})
        values = [row for row in rows if row["protocol"] == protocol]
        report[protocol] = {
            key: float(np.mean([row[key] for row in values])) for key in values[0] if key.startswith("nll_")
        } | {"mean_A": 0.75, "density_hard": 0.71 - index / 100, "seq_gate_frac": 0.91, "hyp_gate_frac": 0.66}
        report[protocol] |= {"cascade_k": 5.0 + index, "entropy_bits": 0.1234 + index / 1000, "dead_heads": index}
        report[protocol]["nll_own_base"] = 3.3 + index / 1000
    write_csv(folder / "nll.csv", rows)
    write_json(folder / "nll.json", report)


# --- what the analysis stages leave --------------------------------------------------------------------------------


def estimate(mean: float, margin: float = 0.0042) -> dict:
    return {"mean": mean, "low": mean - margin, "high": mean + margin, "n": 19}


def chance(observed: float, expected: float = 0.0, p: float = 0.0123) -> dict:
    return {"observed": observed, "chance": expected, "p": p}


def topology(name: str, scale: float, layers: int) -> dict:
    varied = {"gate_variance": 0.0123, "distance_mean": 0.1357, "distance_variance": 0.0024, "information_bits": 0.0789}
    varied = {key: value * scale for key, value in (varied | {"effective_rank": 7.7}).items()}
    varied["distinct"] = WINDOWS if scale else 1
    domains = {"sources": ["numpy", "python"], "windows_per_source": 21, "documents": [5, 6]}
    domains["mean_distances"] = [[0.11 * scale, 0.22 * scale], [0.22 * scale, 0.12 * scale]]
    domains["separation"] = chance(0.0321 * scale)
    domains |= {"probe": chance(0.5 + 0.4 * scale, 0.49), "text_probe": chance(0.97, 0.48)}
    read = {"read": estimate(0.021), "not_read": estimate(0.0276), "read_minus_not_read": estimate(-0.0066 * scale)}
    return {
        "run": f"{name}0123456789abcd",
        "n": WINDOWS,
        "variation": {"window": {"soft": varied}},
        "swapped": {"window": estimate(-0.0081 * scale), "prefix": estimate(-0.0005 * scale)},
        "reading": {"hard": read},
        "domains": domains,
        "checks": {"wirings_are_those_that_were_evaluated": True},
    }


def write_wirings(root: Path, seed: int, layers: int = LAYERS, heads: int = HEADS) -> None:
    generator, nodes = torch.Generator().manual_seed(seed), layers * heads
    gates = {f"window.mean_{mode}": torch.rand(nodes, nodes, generator=generator) for mode in MODES}
    save_checkpoint(root / DATA / "eval/P1/gates.safetensors", gates, {"num_heads": heads})
    tensors = {"distances": torch.rand(66, generator=generator), "same_text": torch.rand(12, generator=generator)}
    save_checkpoint(root / DATA / "analysis/P1/wirings.safetensors", tensors, {})
    masks = (torch.rand(2, nodes, nodes, generator=generator) > 0.5) & dag_mask(layers, heads)
    save_checkpoint(root / DATA / "train/planted/masks.safetensors", {"masks": masks}, {"sources": ["numpy", "python"]})
    logits = {"prefix.logits": torch.randn(WINDOWS, int(dag_mask(layers, heads).sum()), generator=generator)}
    found = root / DATA / "eval/planted_P1_open/gates.safetensors"
    save_checkpoint(found, logits, {"num_layers": layers, "num_heads": heads})


def write_planted(folder: Path, settings: Settings) -> None:
    costs = {"own": 0.0, "other": 1.03, "mean": 0.27, "one": 2.17, "zero": 0.46}
    known = {name: {"minus_own": {key: estimate(cost) for key, cost in costs.items()}} for name in PROTOCOLS}
    signs = {"closed_positive": 0.81, "open_positive": 0.32, "ranked": 0.89}
    write_json(folder / "planted/known.json", known | {"gradients": signs, "sources": ["numpy", "python"]})
    found = {
        "above_own": estimate(0.1234),
        "agreement": 0.61,
        "escape": estimate(0.93, 0.02),
        "probe": chance(0.77, 0.5),
    }
    methods = {}
    for name in (name for name in settings.variants if settings.base_of(name) == "planted"):
        control = "planted_C1_open" if name == "planted_P1_open" else None
        own = found | {"context": estimate(0.44, 0.1) if control else None}
        own |= {"above_own": estimate(0.0912)} if control else {}
        methods[name] = {"run": f"{name}0123456789abcd", "control": control, "window": own, "prefix": own}
    write_json(folder / "planted/methods.json", methods)


def removed(mean: float, **names) -> dict:
    return names | {"mean": mean, "low": mean - 0.003, "high": mean + 0.003, "documents": 11}


def write_sensitivity(folder: Path, layers: int, heads: int) -> None:
    gates = layers * (layers - 1) // 2 * heads**2
    shape = {"n": 53, "documents": 17, "gates": gates, "size": 4.14e-4, "size_of_mean": 7.27e-5}
    shape |= {"size_by_chance": 6.9e-5, "p": 0.237}
    oracle = {text: estimate(mean) for text, mean in {"same": -0.2717, "next": -0.022, "other": 0.0357}.items()}
    summary = {
        "base": "b" * 64,
        "flatness": shape,
        "all_closed": {**estimate(0.0431), "nll_closed": 3.5, "nll_open": BASELINE},
        "removal_windows": 13,
        "groups": [
            {"kind": kind, "first": 1, "second": 2, "promising": promising, "expected": -0.01, **estimate(-0.007)}
            for kind in ("layers", "head")
            for promising in (True, False)
        ],
        "oracle": {"steps": 33, "windows": 9, "closed": 0.37, **oracle},
        "checks": {"gradients_and_removals_are_of_different_documents": True},
    }
    write_json(folder / "summary.json", summary)
    over = {"random": 0.0, "least_gradient": -0.05, "expected_gain": 0.08}
    rows = [
        removed(0.15 * fraction + apart, order=order, fraction=fraction, draws=3)
        | {"over_random": apart, "low_over_random": apart - 0.003, "high_over_random": apart + 0.003}
        for order, apart in over.items()
        for fraction in (0.1, 0.5, 1.0)
    ]
    write_csv(folder / "removal.csv", rows)
