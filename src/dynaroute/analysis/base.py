"""Measures of the base itself: that it is transformers' model, and how much its wiring matters."""

from pathlib import Path
from typing import Any

import torch

from dynaroute.analysis.nll import batches, mean_nll, window_nll
from dynaroute.analysis.statistics import paired_difference
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.hub import load_model
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.training.nll import token_nll

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of NLL against transformers, by the base's dtype


@torch.no_grad()
def measure_base(folder: Path, windows: WindowSet, device: str) -> dict[str, Any]:
    """NLL of a saved base by transformers, and through the DAG with all gates at one and at zero.

    Args:
        folder: of transformers.
        windows: n of them.
        device: cpu or cuda.

    Raises:
        DynarouteError: the base cannot be loaded.
    """
    theirs = load_model(str(folder), "AutoModelForCausalLM", folder, device, "auto")
    base = load_base(folder, device)
    graph = DagForward(base)
    gates = dag_mask(graph.num_layers, graph.num_heads).float()
    losses, difference = [], 0.0
    for indices in batches(len(windows)):
        tokens, targets = (part.to(device) for part in windows.batch(indices))
        logits = theirs(tokens).logits
        losses.append(token_nll(logits, targets).cpu())
        for ours in (base(tokens), graph(tokens, gates.expand(len(tokens), -1, -1).to(device))):
            difference = max(difference, float((ours - logits).abs().max()))
    expected = mean_nll(torch.cat(losses)).mean()
    one, zero = (window_nll(graph, windows, adjacency) for adjacency in (gates, torch.zeros_like(gates)))
    rise = paired_difference(zero, one)
    return {
        "nll_all_gates_one": float(one.mean()),
        "nll_all_gates_zero": float(zero.mean()),
        "zero_minus_one": rise._asdict(),
        "n": len(windows),
        "largest_logit_difference_to_transformers": difference,
        "checks": {
            "all_gates_at_one_reproduce_the_base": bool(abs(one.mean() - expected) < TOLERANCE[base.dtype]),
            "removing_all_head_connections_raises_nll": rise.low > 0,
        },
    }
