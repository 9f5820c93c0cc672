"""Small models and their stores, for the tests of what runs from a store."""

from pathlib import Path

import pytest
import torch

from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.model import DWRConfig, DWRTransformer

RUN = "0123456789abcdef"


def make_model(seed: int = 0, **changes) -> DWRTransformer:
    """A model whose weights are large enough for routing to be far from uniform."""
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 5, "top_k": 2}
    sizes |= {"max_seq_len": 24, "dropout": 0.1, "capacity_factor": None, "vocab_size": 64}
    torch.manual_seed(seed)
    model = DWRTransformer(DWRConfig(**{**sizes, **changes})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def uniform_usage(model: DWRTransformer) -> Usage:
    layers, experts = model.config.num_layers, model.config.num_experts
    return Usage(load=[[1 / experts] * experts] * layers, transitions=[[[2] * experts] * experts] * (layers - 1))


def export(path: Path, model: DWRTransformer | None = None, run: str = RUN, precision: str = "fp32") -> ExpertStore:
    """Exports a model, by default the one of `make_model()`, and opens the store."""
    model = model or make_model()
    export_store(model, run, uniform_usage(model), path, precision)
    return ExpertStore(path)


def mapped_files(folder: Path) -> set[str]:
    """Names of the files of a folder that are mapped into this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    prefix, before, found = f"{folder.resolve()}/", None, None
    while found is None or found != before:  # threads may map files meanwhile, and the list does not come in one piece
        before, found = found, {text.partition(prefix)[2] for text in maps.read_text().splitlines() if prefix in text}
    return found
