"""Orders the edges of a base by how little NLL depends on them to first order: a control for every variant.

    python stages/dagformer/order_edges.py base        (or planted)

The order is that of the absolute mean gradient at A = 1 over documents of the validation split.

Reads   data/tokens/<dagformer.corpus> (validation), data/dagformer/train/<base>
Writes  data/dagformer/edge_order/<base>.json   order, the edge that matters least first, as indices along the valid
            entries; windows; empty if there is no such base
"""

from pathlib import Path

import numpy as np
import torch

from dynaroute.analysis.sensitivity import gate_gradients
from dynaroute.analysis.statistics import document_means
from dynaroute.config import Settings
from dynaroute.config.dagformer import BASES
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.documents import spread_windows, windows_of_documents
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.stage import run

DATA = Path("data/dagformer")


def main(settings: Settings, name: str) -> None:
    """Takes gradients and writes the order."""
    if name not in BASES:
        raise DynarouteError(f"{name}: no base; known: {', '.join(BASES)}")
    torch.set_num_threads(settings.num_threads)
    path, shared = DATA / "edge_order" / f"{name}.json", settings.dagformer
    if name == "planted" and shared.planted is None:
        write_json(path, {})
        return
    shards = TokenShards(Path("data/tokens") / shared.corpus, "validation")
    windows = Windows(shards, shared.seq_len, keep_tail=False)
    chosen = spread_windows(shards, shared.seq_len, settings.analysis.gradient_windows)
    documents = windows_of_documents(shards, shared.seq_len)[chosen]
    graph = DagForward(load_base(DATA / "train" / name, settings.device))
    gradients = gate_gradients(graph, Subset(windows, chosen)).numpy().astype(np.float64)  # [n, E]
    mean = document_means(gradients, documents).mean(0)
    write_json(path, {"windows": len(chosen), "order": np.argsort(np.abs(mean), kind="stable").tolist()})


if __name__ == "__main__":
    run(main, __doc__, "base")
