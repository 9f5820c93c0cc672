"""Exports the best checkpoint as a store of experts, a file each, and checks that the store is that model.

    python stages/dwr/export_experts.py

Reads   data/dwr/train, reports/dwr/router.csv, data/tokens/<dwr.corpus> (its validation split)
Writes  data/dwr/expert_store/   backbone.safetensors, expert_layer{L}_id{E}.safetensors, tokenizer, manifest.json
        data/dwr/export/summary.json  numbers and sizes of files, what lower precision would cost, and checks
"""

import copy
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from pydantic import ValidationError

from dynaroute.analysis.traces import count_transitions, record_routing
from dynaroute.config import Settings
from dynaroute.config.dwr import Precision
from dynaroute.data.tokens.shards import IGNORED_TARGET, TokenShards, Windows
from dynaroute.data.tokens.windows import evenly_spaced
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.precision import round_experts, stored_tensors
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.inference import bind_experts, load_backbone, load_resident
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.stage import run
from dynaroute.training.checkpoints import load_checkpoint, load_weights
from dynaroute.training.nll import nll

TRAINED = Path("data/dwr/train")
STORE = Path("data/dwr/expert_store")
ROUTER = Path("reports/dwr/router.csv")


def main(settings: Settings) -> None:
    """Writes the store, then reads it back."""
    torch.set_num_threads(settings.num_threads)
    export, (trained, identifier) = settings.export_experts, load_trained()
    tokens_folder = Path("data/tokens") / settings.dwr.corpus
    windows = Windows(TokenShards(tokens_folder, "validation"), trained.config.max_seq_len, keep_tail=True)
    num_windows = min(export.calibration_windows, len(windows))
    experts = record_routing(
        trained, evenly_spaced(windows, num_windows, "export_experts.calibration_windows"), identifier
    ).experts
    usage = Usage(
        load=read_expert_load(ROUTER, trained.config),
        transitions=count_transitions(experts, trained.config.num_experts),
    )
    precisions = compare_precisions(trained, windows, range(num_windows))
    export_store(trained, identifier, usage, STORE, export.precision, tokens_folder / "tokenizer")

    store = ExpertStore(STORE)
    store.verify()
    round_experts(trained, export.precision)  # what the store must hold
    tokens, _ = windows.batch(range(min(4, len(windows))))
    reassembled, cached = load_resident(store), load_backbone(store)
    bind_experts(cached, ExpertCache(store, 1))
    with torch.inference_mode():
        logits = trained(tokens).logits
        checks = {
            "every_file_has_its_sha256": True,  # or verify would have raised
            "reassembled_weights_are_those_of_the_best_checkpoint": equal_weights(reassembled, trained),
            "reassembled_logits_are_equal_to_the_bit": torch.equal(reassembled(tokens).logits, logits),
            "logits_with_one_expert_at_a_time_are_equal_to_the_bit": torch.equal(cached(tokens).logits, logits),
        }
    expert_files, backbone = sorted(STORE.glob("expert_*")), STORE / "backbone.safetensors"
    write_json(
        "data/dwr/export/summary.json",
        {
            "run": identifier,
            "expert_files": len(expert_files),
            "expert_file_bytes": expert_files[0].stat().st_size,
            "expert_bytes": store.expert_bytes,
            "backbone_file_bytes": backbone.stat().st_size,
            "total_bytes": sum(path.stat().st_size for path in STORE.rglob("*") if path.is_file()),
            "precision": export.precision,
            "precisions": precisions,
            "calibration_windows": num_windows,
            "tokens_compared": tokens.numel(),
            "checks": checks,
        },
    )
    failed = [name for name, passed in checks.items() if not passed]
    if failed:
        raise DynarouteError(f"{STORE}: not the model that was exported: failed: {', '.join(failed)}")


def compare_precisions(model: DWRTransformer, windows: Windows, indices: Sequence[int]) -> list[dict[str, object]]:
    """For each precision, the bytes of an expert's weights and the NLL with experts of that precision."""
    rows = []
    for precision in get_args(Precision):
        rounded = copy.deepcopy(model)
        round_experts(rounded, precision)
        size = sum(entry.num_bytes() for entry in stored_tensors(model.config, precision).values())
        rows.append({"precision": precision, "expert_bytes": size, "nll": mean_nll(rounded, windows, indices)})
    return rows


@torch.inference_mode()
def mean_nll(model: DWRTransformer, windows: Windows, indices: Sequence[int]) -> float:
    """NLL in nats per token over some windows."""
    total, count = 0.0, 0
    for start in range(0, len(indices), 16):
        tokens, targets = windows.batch(indices[start : start + 16])
        total += float(nll(model(tokens).logits, targets, "sum"))
        count += int((targets != IGNORED_TARGET).sum())
    return total / count


def load_trained() -> tuple[DWRTransformer, str]:
    """The best checkpoint as a model, and the run that it is from.

    Raises:
        DynarouteError: a file of the training is missing or damaged.
    """
    record = read_record(TRAINED / "run.json")
    try:
        config, identifier = DWRConfig.model_validate(record["config"]), record["run"]
    except (KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DynarouteError(f"{TRAINED / 'run.json'}: damaged: {reason}: run the stage train_dwr again") from error
    model = DWRTransformer(config).eval()
    tensors, _ = load_checkpoint(TRAINED / "best.safetensors")
    load_weights(model, tensors, TRAINED / "best.safetensors")
    return model, identifier


def read_expert_load(path: Path, config: DWRConfig) -> list[list[float]]:
    """Each expert's share of its layer's assignments, [L][E], from the router report of the training.

    Raises:
        DynarouteError: the report is missing, or not of a model of this size.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            load = {(int(row["layer"]), int(row["expert"])): float(row["load"]) for row in csv.DictReader(file)}
        return [[load[layer, expert] for expert in range(config.num_experts)] for layer in range(config.num_layers)]
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage train_dwr") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DynarouteError(f"{path}: no load of {error}: run the stage train_dwr again") from error


def equal_weights(model: DWRTransformer, other: DWRTransformer) -> bool:
    """Whether both have the same tensors to the bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    run(main, __doc__)
