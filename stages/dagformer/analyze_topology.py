"""Whether a variant wires different texts differently, by domain as well, and what that is worth: X1 and X2.

    python stages/dagformer/analyze_topology.py P1

All windows are of the test split, whose documents no training has read. Intervals are by document.

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/{train/base,train/<id>,embeddings,eval/<id>}
Writes  data/dagformer/analysis/<id>/
            topology.json         run, variant, n (windows), checks, and
                variation: by protocol and mode, see `topology.variation`
                swapped: by protocol, soft NLL of texts under their own wiring minus that under other texts'
                reading: by mode, see `controls.reading`
                domains: see `domains.describe_domains`; null if the text has but one source
            wirings.safetensors   a checkpoint of ours, of soft gates: distances of all pairs of texts; same_text, of
                each whole window to its own prefix
"""

from pathlib import Path

import numpy as np
import torch

from dynaroute.analysis.controls import reading, swapped_nll
from dynaroute.analysis.domains import describe_domains
from dynaroute.analysis.nll import TEXTS, first_scored, wire
from dynaroute.analysis.statistics import paired_difference
from dynaroute.analysis.topology import jaccard_distances, variation
from dynaroute.config import Settings
from dynaroute.config.dagformer import MODES
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.variants import load_graph, load_predictor
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.documents import domain_windows, windows_of_documents
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, write_json
from dynaroute.pipeline.stage import run
from dynaroute.reporting.inputs import read_csv
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint

DATA = Path("data/dagformer")


def main(settings: Settings, name: str) -> None:
    """Wires the held-out texts and those of each domain, and writes the measures."""
    torch.set_num_threads(settings.num_threads)
    dagformer, analysis = settings.dagformer, settings.analysis
    record, predictor = load_predictor(DATA / "train" / name, settings.device)
    graph = load_graph(DATA / "train", name, record["base"], predictor.variant, settings.device)
    tau, first = predictor.variant.tau_final, first_scored(dagformer.prefix_tokens)
    shards = TokenShards(Path("data/tokens") / dagformer.corpus, "test")
    windows = variant_windows(shards, dagformer)
    embeddings = load_embeddings(DATA / "embeddings/evaluation")
    texts = {protocol: torch.from_numpy(embeddings[split]) for protocol, split in TEXTS.items()}
    documents = windows_of_documents(shards, windows.seq_len)[windows.indices]
    wirings = {protocol: wire(predictor, vectors, tau) for protocol, vectors in texts.items()}
    stored, state = load_checkpoint(DATA / "eval" / name / "gates.safetensors")
    valid = dag_mask(predictor.num_layers, predictor.num_heads)
    same = (torch.equal(wirings[protocol].logits[:, valid], stored[f"{protocol}.logits"]) for protocol in TEXTS)
    rows = read_csv(DATA / "eval" / name / "nll.csv", "nll_soft", "nll_hard", "nll_baseline")
    evaluated = {
        protocol: {mode: own[f"nll_{mode}"].to_numpy() for mode in (*MODES, "baseline")}
        for protocol, own in rows.groupby("protocol")
    }

    swapped = swapped_nll(graph, windows, wirings, evaluated, first, analysis.swaps)
    sets = {mode: {protocol: wirings[protocol].gates(mode) for protocol in TEXTS} for mode in MODES}
    report = {
        "run": record["run"],
        "variant": name,
        "n": len(windows),
        "variation": {protocol: {mode: variation(sets[mode][protocol]) for mode in MODES} for protocol in TEXTS},
        "swapped": {
            protocol: paired_difference(evaluated[protocol]["soft"], other, documents)._asdict()
            for protocol, other in swapped.items()
        },
        "reading": reading(graph, windows, wirings, evaluated, documents, first["prefix"]),
        "checks": {"wirings_are_those_that_were_evaluated": state["run"] == record["run"] and all(same)},
        "domains": None,
    }  # fmt: skip
    soft = sets["soft"]
    pairs = torch.triu_indices(len(windows), len(windows), 1)
    tensors = {
        "distances": jaccard_distances(soft["window"], soft["window"])[tuple(pairs)],
        "same_text": jaccard_distances(soft["window"], soft["prefix"]).diagonal(),
    }
    drawn = domain_windows(shards, windows.seq_len, analysis.domain_windows)
    if drawn is not None:
        folder = DATA / "embeddings/domains"
        vectors = torch.from_numpy(load_embeddings(folder).get("domains", np.empty(0)))
        if len(vectors) != len(drawn.windows):
            found = f"{len(vectors)} texts of domains, not {len(drawn.windows)}"
            raise DynarouteError(f"{folder}: {found}: run the stage encode_windows again")
        wiring, scaled = wire(predictor, vectors, tau), vectors * predictor.embedding_inverse_std.cpu()
        tests = analysis.permutations, settings.seed
        report["domains"] = describe_domains(wiring, scaled.numpy(), drawn, *tests)

    state = {"run": record["run"], "variant": name}
    with output_directory(DATA / "analysis" / name) as folder:
        write_json(folder / "topology.json", report)
        save_checkpoint(folder / "wirings.safetensors", tensors, state)


if __name__ == "__main__":
    run(main, __doc__, "variant")
