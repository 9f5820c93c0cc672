"""Compares what methods find on the planted base with what was planted: the positive control.

    python stages/dagformer/analyze_planted.py

All windows are of the test split, the same on which variants are scored. Intervals are by document.

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/train/planted; data/dagformer/{train,eval}/<id> of every
        variant that starts from it
Writes  data/dagformer/planted/
            known.json     by protocol, NLL of wirings that need no training, see `known_nll`, and each minus that of
                the own mask; gradients, see `gradient_signs`; sources; n; empty if dagformer.planted is null
            methods.json   by variant: run; control, the variant that reads no text and differs in nothing else, if
                there is one; and by protocol, for hard gates: nll; above_own; escape; context, if there is a control;
                agreement and probe; see `dynaroute.analysis.planted`
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynaroute.analysis.nll import TEXTS, first_scored, wire
from dynaroute.analysis.planted import context, escape, gradient_signs, known_nll, recovery
from dynaroute.analysis.statistics import paired_difference
from dynaroute.config import Settings
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.planted import load_masks
from dynaroute.dagformer.variants import load_predictor
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.documents import windows_of_documents
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.pipeline.artifacts import output_directory, write_json
from dynaroute.pipeline.stage import run
from dynaroute.reporting.inputs import read_csv

DATA = Path("data/dagformer")


def main(settings: Settings) -> None:
    """Scores the known wirings, compares the methods' with them, and writes both."""
    torch.set_num_threads(settings.num_threads)
    shared = settings.dagformer
    if shared.planted is None:
        with output_directory(DATA / "planted") as folder:
            for name in ("known", "methods"):
                write_json(folder / f"{name}.json", {})
        return
    shards = TokenShards(Path("data/tokens") / shared.corpus, "test")
    windows = variant_windows(shards, shared)
    documents = windows_of_documents(shards, windows.seq_len)[windows.indices]
    sources = shards.document_sources[documents].astype(np.int64)
    graph = DagForward(load_base(DATA / "train/planted", settings.device))
    masks, names = load_masks(DATA / "train/planted")
    known = known_nll(graph, windows, masks, sources, first_scored(shared.prefix_tokens))
    found = {
        protocol: {
            "nll": {key: float(nll.mean()) for key, nll in own.items()},
            "minus_own": {key: paired_difference(nll, own["own"], documents)._asdict() for key, nll in own.items()},
        }
        for protocol, own in known.items()
    }
    found |= {"gradients": gradient_signs(graph, windows, masks, sources), "sources": names, "n": len(windows)}
    with output_directory(DATA / "planted") as folder:
        write_json(folder / "known.json", found)
        write_json(folder / "methods.json", methods(settings, known, masks, sources, documents))


def methods(
    settings: Settings, known: dict[str, Any], masks: torch.Tensor, sources: np.ndarray, documents: np.ndarray
) -> dict[str, Any]:
    """The measures of every variant that was trained on the planted base."""
    names = [name for name in settings.variants if settings.base_of(name) == "planted"]
    valid = dag_mask(settings.dagformer.planted.num_layers, settings.dagformer.planted.num_heads)
    permutations = settings.analysis.permutations
    vectors = load_embeddings(DATA / "embeddings/evaluation")
    nll = {}
    for name in names:
        rows = read_csv(DATA / "eval" / name / "nll.csv", "nll_hard")
        nll[name] = {protocol: own["nll_hard"].to_numpy() for protocol, own in rows.groupby("protocol")}
    found: dict[str, Any] = {}
    for name in names:
        record, predictor = load_predictor(DATA / "train" / name, settings.device)
        silent = settings.variant(name).model_copy(update={"predictor_input": "none"})
        controls = [other for other in names if other != name and settings.variant(other) == silent]
        found[name] = {"run": record["run"], "control": controls[0] if controls else None}
        for protocol, split in TEXTS.items():
            wiring = wire(predictor, torch.from_numpy(vectors[split]), predictor.variant.tau_final)
            own = nll[name][protocol]
            found[name][protocol] = {
                "nll": float(own.mean()),
                "above_own": paired_difference(own, known[protocol]["own"], documents)._asdict(),
                "escape": escape(own, known[protocol], documents)._asdict(),
                "context": context(own, nll[controls[0]][protocol], known[protocol], documents)._asdict()
                if controls
                else None,
                **recovery(wiring.hard[:, valid], masks[:, valid], sources, documents, permutations, settings.seed),
            }
    return found


if __name__ == "__main__":
    run(main, __doc__)
