"""Scores one DAGFormer variant on held-out text: NLL in three modes by two protocols, and measures of its wirings.

    python stages/dagformer/evaluate_nll.py P1

Modes      soft      gates at the variant's final temperature, with its cascade
           hard      gates of 0 and 1
           baseline  all gates at one: the shared base as it is, the same numbers for every variant
Protocols  window    the encoder reads the whole window, so it has read the tokens that are scored
           prefix    the encoder reads the first dagformer.prefix_tokens, and only the tokens after them are scored,
                     in all three modes

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/{train/base,train/<id>,embeddings/evaluation}
Writes  data/dagformer/eval/<id>/
            nll.csv   a row for each protocol and window: protocol; window, its index among all whole windows of the
                test split; document, the one that most of its tokens are from, and its source; nll_soft, nll_hard,
                nll_baseline, in nats per token
            nll.json  run, variant, n (windows), checks, and for each protocol: tokens scored; nll_soft, nll_hard,
                nll_baseline, means over windows; the measures of `dynaroute.analysis.topology.measure`; nll_own_base,
                if the base was trained jointly: its mean NLL with all gates at one
            gates.safetensors   a checkpoint of ours, with float32 tensors for each protocol:
                <protocol>.logits [n, valid entries], where Z[:, dag_mask(num_layers, num_heads)] = logits;
                <protocol>.mean_soft, <protocol>.mean_hard [N, N];
                state: run, variant, num_layers, num_heads, tau, cascade_k (trained), windows (as in nll.csv)
"""

from pathlib import Path

import numpy as np
import torch

from dynaroute.analysis.nll import BATCH, window_nll, wire
from dynaroute.analysis.topology import measure
from dynaroute.config import Settings
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.variants import load_graph, load_predictor
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.documents import main_documents
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, sha256, write_csv, write_json
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import save_checkpoint

TRAINED, EMBEDDINGS = Path("data/dagformer/train"), Path("data/dagformer/embeddings/evaluation")


def main(settings: Settings, name: str) -> None:
    """Wires every window by both protocols, scores all modes, and writes the results."""
    torch.set_num_threads(settings.num_threads)
    record, predictor = load_predictor(TRAINED / name, settings.device)
    variant = predictor.variant
    shards = TokenShards(Path("data/tokens") / settings.dagformer.corpus, "test")
    windows = variant_windows(shards, settings.dagformer)
    documents = main_documents(shards, windows.seq_len, list(windows.indices))
    embeddings = load_embeddings(EMBEDDINGS)
    graph = load_graph(TRAINED, name, variant, settings.device)
    joint = variant.base_lr > 0
    shared = not joint and variant.input_norm == "none"
    dense = graph if shared else DagForward(load_base(TRAINED / "base", settings.device))
    valid = dag_mask(graph.num_layers, graph.num_heads)

    # Position prefix_tokens - 1, the last one of the prefix, predicts the first token that the encoder has not read.
    protocols = {"window": ("test", 0), "prefix": ("test_prefix", settings.dagformer.prefix_tokens - 1)}
    start = Subset(windows.windows, windows.indices[:BATCH])
    rows, metrics, gates, repeats = [], {}, {}, []
    for protocol, (split, first) in protocols.items():
        if len(embeddings[split]) != len(windows):
            found = f"{len(embeddings[split])} texts of {split}, not dagformer.eval_windows = {len(windows)}"
            raise DynarouteError(f"{EMBEDDINGS}: {found}: run stages/dagformer/encode_windows.py again")
        wiring = wire(predictor, torch.from_numpy(embeddings[split]), variant.tau_final)
        nll = {
            "soft": window_nll(graph, windows, wiring.soft, first),
            "hard": window_nll(graph, windows, wiring.hard, first),
            "baseline": window_nll(dense, windows, valid.float(), first),
        }
        repeats.append(np.array_equal(window_nll(graph, start, wiring.soft[:BATCH], first), nll["soft"][:BATCH]))
        for index, (window, document) in enumerate(zip(windows.indices, documents.tolist(), strict=True)):
            source = shards.sources[int(shards.document_sources[document])]
            row = {"protocol": protocol, "window": window, "document": document, "source": source}
            rows.append(row | {f"nll_{mode}": float(values[index]) for mode, values in nll.items()})
        metrics[protocol] = {
            "tokens": len(windows) * (windows.seq_len - first),
            **{f"nll_{mode}": float(values.mean()) for mode, values in nll.items()},
            **measure(wiring.soft, wiring.hard, graph.num_heads),
            "cascade_k": None if variant.cascade == "off" else float(predictor.cascade_k),
        }
        if joint:
            metrics[protocol]["nll_own_base"] = float(window_nll(graph, windows, valid.float(), first).mean())
        gates[f"{protocol}.logits"] = wiring.logits[:, valid]
        gates[f"{protocol}.mean_soft"], gates[f"{protocol}.mean_hard"] = wiring.soft.mean(0), wiring.hard.mean(0)

    checks = {
        "base_is_the_file_that_the_variant_was_trained_on": sha256(TRAINED / "base" / "model.safetensors")
        == record["identity"]["base"],
        "a_batch_scored_again_gives_the_same_bits": all(repeats),
    }
    state = {"run": record["run"], "variant": name, "num_layers": graph.num_layers, "num_heads": graph.num_heads}
    state |= {"tau": variant.tau_final, "cascade_k": float(predictor.cascade_k), "windows": list(windows.indices)}
    with output_directory(Path("data/dagformer/eval") / name) as folder:
        write_csv(folder / "nll.csv", rows)
        write_json(
            folder / "nll.json",
            {"run": record["run"], "variant": name, "n": len(windows), **metrics, "checks": checks},
        )
        save_checkpoint(folder / "gates.safetensors", gates, state)


if __name__ == "__main__":
    run(main, __doc__, "variant")
