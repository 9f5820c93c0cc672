"""What storing the experts of a DWR model in lower precision saves and costs."""

import copy
from typing import get_args

import torch

from dynaroute.config.dwr import Precision
from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.data.tokens.windows import WindowSet
from dynaroute.dwr.experts.precision import round_experts, stored_tensors
from dynaroute.dwr.model import DWRTransformer
from dynaroute.training.nll import nll


def compare_precisions(model: DWRTransformer, windows: WindowSet) -> list[dict[str, object]]:
    """For each precision, the bytes of an expert's weights and the NLL with experts of that precision."""
    rows = []
    for precision in get_args(Precision):
        rounded = copy.deepcopy(model)
        round_experts(rounded, precision)
        size = sum(entry.num_bytes() for entry in stored_tensors(model.config, precision).values())
        rows.append({"precision": precision, "expert_bytes": size, "nll": mean_nll(rounded, windows)})
    return rows


@torch.inference_mode()
def mean_nll(model: DWRTransformer, windows: WindowSet) -> float:
    """NLL in nats per token over all windows, which may end in targets that count for nothing."""
    total, count = 0.0, 0
    for start in range(0, len(windows), 16):
        tokens, targets = windows.batch(range(start, min(start + 16, len(windows))))
        total += float(nll(model(tokens).logits, targets, "sum"))
        count += int((targets != IGNORED_TARGET).sum())
    return total / count
