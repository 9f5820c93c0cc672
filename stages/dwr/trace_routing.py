"""Records the experts that every token of held-out text uses, and those that gate lookahead predicts.

    python stages/dwr/trace_routing.py

Reads   data/dwr/expert_store, data/tokens/<dwr.corpus>
Writes  data/dwr/trace/  experts.npy [tokens, layers, top_k], lookahead.npy [tokens, layers - 1, experts], metadata.json
"""

from pathlib import Path

import torch

from dynaroute.analysis.traces import record_routing, save_trace
from dynaroute.config import Settings
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.dwr.experts.store import ExpertStore
from dynaroute.dwr.inference import load_resident
from dynaroute.dwr.windows import traced_windows
from dynaroute.pipeline.stage import run

STORE = Path("data/dwr/expert_store")
TRACE = Path("data/dwr/trace")


def main(settings: Settings) -> None:
    """Passes windows of the test split through the resident model."""
    torch.set_num_threads(settings.num_threads)
    store = ExpertStore(STORE)
    shards = TokenShards(Path("data/tokens") / settings.dwr.corpus, "test")
    windows = traced_windows(shards, store.config.max_seq_len, settings.trace_routing)
    save_trace(record_routing(load_resident(store), windows, store.run), TRACE)


if __name__ == "__main__":
    run(main, __doc__)
