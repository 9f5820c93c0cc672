"""What the routers of a trained DWR model do."""

import math

from torch import Tensor

from dynaroute.data.tokens.windows import WindowSet
from dynaroute.dwr.model import DWRTransformer
from dynaroute.training.nll import nll


def router_gradients(model: DWRTransformer, windows: WindowSet) -> list[tuple[float, float]]:
    """By layer, the norm of the NLL's gradient at the router and at all its experts together, over one window."""
    model.eval()
    tokens, targets = (part.to(next(model.parameters()).device) for part in windows.batch([0]))
    nll(model(tokens).logits, targets).backward()
    norms = [
        (
            float(layer.moe.router.weight.grad.norm()),
            math.hypot(*(float(p.grad.norm()) for p in layer.moe.experts.parameters() if p.grad is not None)),
        )
        for layer in model.layers
    ]
    model.zero_grad(set_to_none=True)
    return norms


def router_rows(model: DWRTransformer, sums: dict[str, Tensor]) -> list[dict[str, float]]:
    """A row for each expert: the L2 norm of its router row, its share of assignments, its mean probability."""
    load = sums["assigned"] / sums["assigned"].sum(1, keepdim=True)  # [L, E]
    probability = sums["probability"] / sums["predicted"]  # [L, E]
    return [
        {
            "layer": index,
            "expert": expert,
            "gate_norm": float(norm),
            "load": float(load[index, expert]),
            "mean_probability": float(probability[index, expert]),
        }
        for index, layer in enumerate(model.layers)
        for expert, norm in enumerate(layer.moe.router.weight.detach().norm(dim=1))
    ]
