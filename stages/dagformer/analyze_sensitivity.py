"""How sensitive the base's NLL is to its wiring: X3 of the published report. No predictor takes part.

    python stages/dagformer/analyze_sensitivity.py

All windows are of the test split, whose documents no training has read, evenly chosen over documents. Orders of
removal come from gradients on one half of the documents and are scored on the other half. Intervals are by document.

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/train/base
Writes  data/dagformer/sensitivity/
            summary.json   flatness at A = 1; all_closed, on the windows that variants are evaluated on; oracle, see
                           `score_oracle`, with closed, the share of its edges that it closes; groups, layer pairs and
                           heads without whose edges NLL was measured, see `group_removals`; checks
            removal.csv    a row for each order of removal and share of edges removed, see `removals`
"""

from pathlib import Path

import numpy as np
import torch

from dynaroute.analysis.sensitivity import (
    closing_all,
    flatness,
    gate_gradients,
    group_removals,
    optimise_gates,
    removals,
    score_oracle,
)
from dynaroute.analysis.statistics import document_means
from dynaroute.config import Settings
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.documents import followed_windows, halves, windows_of_documents
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset, evenly_spaced
from dynaroute.pipeline.artifacts import output_directory, sha256, write_csv, write_json
from dynaroute.pipeline.stage import run

BASE = Path("data/dagformer/train/base")


def main(settings: Settings) -> None:
    """Takes gradients, removes edges, optimises gates, and writes the results."""
    torch.set_num_threads(settings.num_threads)
    analysis = settings.analysis
    shards = TokenShards(Path("data/tokens") / settings.dagformer.corpus, "test")
    windows = Windows(shards, settings.dagformer.seq_len, keep_tail=False)
    documents = windows_of_documents(shards, windows.seq_len)
    sizes = analysis.gradient_windows, analysis.removal_windows
    ranked, scored = (Subset(windows, half) for half in halves(documents, sizes))
    followed = followed_windows(documents, analysis.oracle_windows)
    evaluated = variant_windows(shards, settings.dagformer)
    graph = DagForward(load_base(BASE, settings.device))

    gradients = gate_gradients(graph, ranked).numpy().astype(np.float64)  # [n, E]
    ranked_by, scored_by = documents[ranked.indices], documents[scored.indices]
    mean_gradient = document_means(gradients, ranked_by).mean(0)
    removed = removals(graph, scored, scored_by, mean_gradient, analysis, settings.seed)
    some = evenly_spaced(scored, min(analysis.group_windows, len(scored)), "analysis.group_windows")
    groups = group_removals(graph, some, scored_by[some.indices], mean_gradient, analysis.group_removals)
    gates = optimise_gates(graph, Subset(windows, followed), analysis.oracle_steps, analysis.oracle_lr)
    closed = 1 - float(gates[:, dag_mask(graph.num_layers, graph.num_heads)].mean())
    oracle = score_oracle(graph, windows, followed, documents, gates)
    with output_directory("data/dagformer/sensitivity") as folder:
        write_csv(folder / "removal.csv", removed)
        write_json(
            folder / "summary.json",
            {
                "base": sha256(BASE / "model.safetensors"),
                "flatness": flatness(gradients, ranked_by, analysis.permutations, settings.seed),
                "all_closed": closing_all(graph, evaluated, documents[evaluated.indices]),
                "removal_windows": len(scored),
                "groups": groups,
                "oracle": {"steps": analysis.oracle_steps, "windows": len(followed), "closed": closed, **oracle},
                "checks": {
                    "gradients_and_removals_are_of_different_documents": not set(ranked_by) & set(scored_by),
                    "optimised_gates_are_better_on_their_own_window": oracle["same"]["high"] < 0,
                },
            },
        )


if __name__ == "__main__":
    run(main, __doc__)
