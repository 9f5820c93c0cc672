"""Scores one DAGFormer variant on held-out text: NLL in three modes by two protocols, and measures of its wirings.

    python stages/dagformer/evaluate_nll.py P1

Modes      soft      gates at the variant's final temperature, with its cascade
           hard      gates of 0 and 1
           random    as many edges of each window closed as its hard gates of the window protocol close, but drawn at
                     random; for both protocols
           least_gradient  as many closed, those that matter least to first order (order_edges)
           baseline  all gates at one: the shared base as it is, the same numbers for every variant
Protocols  window    the encoder reads the whole window, so it has read the tokens that are scored
           prefix    the encoder reads the first dagformer.prefix_tokens, and only the tokens after them are scored,
                     in all modes

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/{train/<base>,edge_order/<base>.json,train/<id>},
        data/dagformer/embeddings/evaluation
Writes  data/dagformer/eval/<id>/
            nll.csv   a row for each protocol and window: protocol; window, its index among all whole windows of the
                test split; document, in which it lies, and its source; nll_<mode> and
                kl_<mode>, from the baseline, in nats per token
            nll.json  run, variant, n (windows), checks, and for each protocol: tokens scored; nll_<mode> and
                kl_<mode>, means over windows; the measures of `dynaroute.analysis.topology.measure`; nll_own_base,
                if the base was trained jointly: its mean NLL with all gates at one
            gates.safetensors   a checkpoint of ours, with float32 tensors for each protocol:
                <protocol>.logits [n, valid entries], where Z[:, dag_mask(num_layers, num_heads)] = logits;
                <protocol>.mean_soft, <protocol>.mean_hard [N, N];
                state: run, variant, num_layers, num_heads, tau, cascade_k (trained), windows (as in nll.csv)
"""

from pathlib import Path

import numpy as np
import torch

from dynaroute.analysis.controls import equally_dense
from dynaroute.analysis.nll import BATCH, TEXTS, compare_to_base, first_scored, mean_nll, position_nll, wire
from dynaroute.analysis.topology import measure
from dynaroute.config import Settings
from dynaroute.config.dagformer import MODES
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.variants import load_graph, load_predictor
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.documents import windows_of_documents
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, read_record, sha256, write_csv, write_json
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import save_checkpoint

DATA = Path("data/dagformer")
TRAINED, EMBEDDINGS = DATA / "train", DATA / "embeddings/evaluation"


def main(settings: Settings, name: str) -> None:
    """Wires every window by both protocols, scores all modes, and writes the results."""
    torch.set_num_threads(settings.num_threads)
    record, predictor = load_predictor(TRAINED / name, settings.device)
    base, variant, shared = record["base"], predictor.variant, settings.dagformer
    shards = TokenShards(Path("data/tokens") / shared.corpus, "test")
    windows = variant_windows(shards, shared)
    documents = windows_of_documents(shards, windows.seq_len)[windows.indices]
    graph = load_graph(TRAINED, name, base, variant, settings.device)
    own_base = variant.base_lr > 0
    dense = graph
    if own_base or variant.input_norm != "none":  # the baseline is the shared base without an input norm
        dense = DagForward(load_base(TRAINED / base, settings.device))
    valid = dag_mask(graph.num_layers, graph.num_heads)
    embeddings = load_embeddings(EMBEDDINGS)
    if (found := len(embeddings["test"])) != len(windows):
        raise DynarouteError(f"{EMBEDDINGS}: {found} texts, but {len(windows)} windows: run encode_windows again")
    wirings = {
        protocol: wire(predictor, torch.from_numpy(embeddings[texts]), variant.tau_final)
        for protocol, texts in TEXTS.items()
    }
    hard = wirings["window"].hard
    order = np.array(read_record(DATA / f"edge_order/{base}.json")["order"])

    # A wiring that does not depend on the protocol is run once, and scored by both.
    runs = {"random": equally_dense(hard, valid, variant.seed)}
    runs["least_gradient"] = equally_dense(hard, valid, variant.seed, order)
    runs |= {mode: getattr(wirings["window"], mode) for mode in MODES}
    of_prefix = {mode: getattr(wirings["prefix"], mode) for mode in MODES}
    runs |= {f"prefix_{mode}": own for mode, own in of_prefix.items() if not torch.equal(own, runs[mode])}
    if own_base:
        runs["own_base"] = valid.float().expand_as(hard)
    scored = compare_to_base(graph, dense, windows, runs)  # NLL and KL of every position, [n, T]
    rows, metrics, gates = [], {}, {}
    for protocol, first in first_scored(shared.prefix_tokens).items():
        wiring = wirings[protocol]
        scores = {}
        for score, values in zip(("nll", "kl"), scored, strict=True):
            own = {key: value for key, value in values.items() if not key.startswith("prefix_")}
            own |= {key: values[f"{protocol}_{key}"] for key in MODES if f"{protocol}_{key}" in values}
            scores |= {f"{score}_{key}": mean_nll(value, first) for key, value in own.items()}
        for index, (window, document) in enumerate(zip(windows.indices, documents.tolist(), strict=True)):
            source = shards.sources[int(shards.document_sources[document])]
            row = {"protocol": protocol, "window": window, "document": document, "source": source}
            rows.append(row | {key: float(values[index]) for key, values in scores.items()})
        metrics[protocol] = {
            "tokens": len(windows) * (windows.seq_len - first),
            **{key: float(values.mean()) for key, values in scores.items()},
            **measure(wiring.soft, wiring.hard, graph.num_heads),
            "cascade_k": None if variant.cascade == "off" else float(predictor.cascade_k),
        }
        gates[f"{protocol}.logits"] = wiring.logits[:, valid]
        gates[f"{protocol}.mean_soft"], gates[f"{protocol}.mean_hard"] = wiring.soft.mean(0), wiring.hard.mean(0)

    start = Subset(windows.windows, windows.indices[:BATCH])
    again, nll = position_nll(graph, start, of_prefix["hard"][:BATCH]), scored[0].get("prefix_hard", scored[0]["hard"])
    checks = {
        "base_is_the_file_that_the_variant_was_trained_on": sha256(TRAINED / base / "model.safetensors")
        == record["identity"]["base"],
        "a_batch_scored_again_gives_the_same_bits": torch.equal(again, nll[:BATCH]),
    }
    state = {"run": record["run"], "variant": name, "num_layers": graph.num_layers, "num_heads": graph.num_heads}
    state |= {"tau": variant.tau_final, "cascade_k": float(predictor.cascade_k), "windows": windows.indices}
    with output_directory(DATA / "eval" / name) as folder:
        write_csv(folder / "nll.csv", rows)
        about = {"run": record["run"], "variant": name, "n": len(windows)}
        write_json(folder / "nll.json", {**about, **metrics, "checks": checks})
        save_checkpoint(folder / "gates.safetensors", gates, state)


if __name__ == "__main__":
    run(main, __doc__, "variant")
