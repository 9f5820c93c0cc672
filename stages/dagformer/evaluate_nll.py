"""Scores one DAGFormer variant on held-out text: NLL in three modes by two protocols, and measures of its wirings.

    python stages/dagformer/evaluate_nll.py P1

A variant whose base was trained jointly is scored on that base, but for the baseline, which is the same for all.

Modes      soft      gates at the variant's final temperature, with its cascade
           hard      gates of 0 and 1
           baseline  all gates at one: the base as it is, the same numbers for every variant
Protocols  window    the encoder reads the whole window, so it has seen the tokens that are scored
           prefix    the encoder reads the first dagformer.prefix_tokens, and only what comes after them is scored,
                     in all three modes

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/base, data/dagformer/embeddings, data/dagformer/<id>
Writes  reports/dagformer/<id>/nll.csv     a row for each protocol and window:
            protocol; window, its index among all whole windows of the test split; source, that most of its tokens are
            from; tokens, that are counted; nll_soft, nll_hard, nll_baseline, in nats per token
        reports/dagformer/<id>/nll.json    run, variant, n (windows), checks, largest_logit_difference_to_transformers,
            and for each protocol: tokens; nll_soft, nll_hard, nll_baseline, means over windows; soft_minus_baseline and
            hard_minus_baseline, each mean, low and high of the paired 95 % t interval, n, verdict; the measures of
            `dynaroute.analysis.topology.measure`; nll_own_base, if the base was trained jointly: its mean NLL with
            all gates at one
        data/eval/<id>/gates.safetensors   a checkpoint of ours, with float32 tensors for each protocol:
            <protocol>.logits [n, valid entries], where Z[:, dag_mask(num_layers, num_heads)] = logits;
            <protocol>.mean_soft, <protocol>.mean_hard [N, N];
            state: run, variant, num_layers, num_heads, tau, cascade_k (trained), windows (as in nll.csv)
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynaroute.analysis.nll import baseline_nll, sequence_nll, tokens_by_source, wire, wired_nll
from dynaroute.analysis.statistics import paired_difference, verdict
from dynaroute.analysis.topology import measure
from dynaroute.config import Settings
from dynaroute.dagformer.base import load_base
from dynaroute.dagformer.encoders import load_embeddings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.trained import load_predictor
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256, write_csv, write_json
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import save_checkpoint

DATA, REPORTS, EVALUATED = Path("data/dagformer"), Path("reports/dagformer"), Path("data/eval")
BATCH = 8  # windows. A constant: float sums depend on it, and the baseline must not differ between variants
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the baseline's NLL against transformers, by base dtype


def main(settings: Settings, name: str) -> None:
    """Wires every window by both protocols, scores all modes, and writes what was found."""
    torch.set_num_threads(settings.num_threads)
    record, predictor = load_predictor(DATA / name, settings.device)
    shards = TokenShards(Path("data/tokens") / settings.dagformer.corpus, "test")
    windows = Subset(Windows(shards, settings.dagformer.seq_len, keep_tail=False), settings.dagformer.eval_windows)
    embeddings = load_embeddings(DATA / "embeddings/evaluation")
    base = load_base(DATA / "base", settings.device)
    before = [parameter.clone() for parameter in base.parameters()]
    dense = DagForward(base)
    input_norm = predictor.variant.input_norm
    joint = predictor.variant.base_lr > 0
    if joint:
        graph = DagForward(load_base(DATA / name / "base", settings.device), input_norm)
    else:
        graph = dense if input_norm == "none" else DagForward(base, input_norm)

    baseline = baseline_nll(dense, windows, BATCH)
    _, targets = windows.batch(range(len(windows)))  # [n, T]
    # Position prefix_tokens - 1, the last one of the prefix, predicts the first token that the encoder has not read.
    protocols = {"window": ("test", 0), "prefix": ("test_prefix", settings.dagformer.prefix_tokens - 1)}
    trained_k = None if predictor.variant.cascade == "off" else float(predictor.cascade_k)
    rows, metrics, gates, repeats = [], {}, {}, []
    for protocol, (split, first) in protocols.items():
        if len(embeddings[split]) != len(windows):
            found = f"{len(embeddings[split])} texts of {split}, not dagformer.eval_windows = {len(windows)}"
            raise DynarouteError(f"{DATA / 'embeddings/evaluation'}: {found}: run the stage encode_windows again")
        wiring = wire(predictor, torch.from_numpy(embeddings[split]), predictor.variant.tau_final, BATCH)
        soft = wired_nll(graph, windows, wiring.soft, BATCH)  # [n, T]
        hard = wired_nll(graph, windows, wiring.hard, BATCH)
        repeats.append(torch.equal(wired_nll(graph, windows, wiring.soft[:BATCH], BATCH), soft[:BATCH]))
        nll = {}  # per token of each window, float64 [n], by mode
        for mode, losses in (("soft", soft), ("hard", hard), ("baseline", baseline.nll)):
            sums, counts = sequence_nll(losses, targets, first)
            nll[mode] = (sums / counts).numpy()
        rows += window_rows(protocol, windows, counts, nll)
        metrics[protocol] = summary(counts, nll) | measure(wiring.soft, wiring.hard, graph.num_heads)
        metrics[protocol]["cascade_k"] = trained_k
        if joint:
            metrics[protocol]["nll_own_base"] = open_nll(graph, windows, targets, first)
        gates[f"{protocol}.logits"] = wiring.logits[:, dag_mask(graph.num_layers, graph.num_heads)]
        gates[f"{protocol}.mean_soft"], gates[f"{protocol}.mean_hard"] = wiring.soft.mean(0), wiring.hard.mean(0)

    disagreement = abs(metrics["window"]["nll_baseline"] - baseline.transformers_nll)
    checks = {
        "baseline_nll_is_the_loss_of_transformers": disagreement <= TOLERANCE[base.dtype],
        "base_is_the_file_that_the_variant_was_trained_on": sha256(DATA / "base" / "model.safetensors")
        == record["identity"]["base"],
        "base_is_unchanged_to_the_bit": all(map(torch.equal, base.parameters(), before)),
        "base_holds_no_gradients": all(p.grad is None and not p.requires_grad for p in base.parameters()),
        "a_batch_scored_again_gives_the_same_bits": all(repeats),
    }
    write_csv(REPORTS / name / "nll.csv", rows)
    write_json(
        REPORTS / name / "nll.json",
        {
            "run": record["run"],
            "variant": name,
            "n": len(windows),
            **metrics,
            "transformers_nll": baseline.transformers_nll,
            "largest_logit_difference_to_transformers": baseline.largest_logit_difference,
            "checks": checks,
        },
    )
    state = {"run": record["run"], "variant": name, "num_layers": graph.num_layers, "num_heads": graph.num_heads}
    state |= {"tau": predictor.variant.tau_final, "cascade_k": float(predictor.cascade_k)}
    save_checkpoint(EVALUATED / name / "gates.safetensors", gates, state | {"windows": list(windows.indices)})


def open_nll(graph: DagForward, windows: Subset, targets: Tensor, first: int) -> float:
    """Mean NLL over windows with all gates at one, from position `first` on."""
    gates = dag_mask(graph.num_layers, graph.num_heads).float().expand(len(windows), -1, -1)
    sums, counts = sequence_nll(wired_nll(graph, windows, gates, BATCH), targets, first)
    return float((sums / counts).mean())


def window_rows(
    protocol: str, windows: Subset, counts: Tensor, nll: dict[str, np.ndarray]
) -> list[dict[str, str | int | float]]:
    """A row for each window: where it is, what it is about, and its NLL by mode."""
    shards, length = windows.windows.shards, windows.seq_len
    rows = []
    for index, window in enumerate(windows.indices):
        tokens = tokens_by_source(shards, window * length, (window + 1) * length)
        source = shards.sources[int(tokens.argmax())]
        row = {"protocol": protocol, "window": window, "source": source, "tokens": int(counts[index])}
        rows.append(row | {f"nll_{mode}": float(values[index]) for mode, values in nll.items()})
    return rows


def summary(counts: Tensor, nll: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean NLL by mode, and the paired difference of each mode from the baseline."""
    metrics = {"tokens": int(counts.sum())} | {f"nll_{mode}": float(values.mean()) for mode, values in nll.items()}
    for mode in ("soft", "hard"):
        difference = paired_difference(nll[mode], nll["baseline"])
        metrics[f"{mode}_minus_baseline"] = {**difference._asdict(), "verdict": verdict(difference)}
    return metrics


if __name__ == "__main__":
    run(main, __doc__, "variant")
