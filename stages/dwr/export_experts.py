"""Exports the best checkpoint as a store of experts, a file each, and checks that the store is that model.

    python stages/dwr/export_experts.py

Reads   data/dwr/train, reports/dwr/router.csv, data/tokens/<dwr.corpus> (its validation split)
Writes  data/dwr/expert_store/   backbone.safetensors, expert_layer{L}_id{E}.safetensors, tokenizer, manifest.json
        data/dwr/export/summary.json  numbers and sizes of files, what lower precision would cost, and checks
"""

from pathlib import Path

import torch

from dynaroute.analysis.precisions import compare_precisions
from dynaroute.analysis.traces import count_transitions, record_routing
from dynaroute.config import Settings
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import evenly_spaced
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.precision import round_experts
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.inference import bind_experts, load_backbone, load_resident
from dynaroute.dwr.model import DWRTransformer
from dynaroute.dwr.trained import load_trained, read_expert_load
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.stage import run

TRAINED = Path("data/dwr/train")
STORE = Path("data/dwr/expert_store")
ROUTER = Path("reports/dwr/router.csv")


def main(settings: Settings) -> None:
    """Writes the store, then reads it back."""
    torch.set_num_threads(settings.num_threads)
    export, (trained, identifier) = settings.export_experts, load_trained(TRAINED)
    tokens_folder = Path("data/tokens") / settings.dwr.corpus
    windows = Windows(TokenShards(tokens_folder, "validation"), trained.config.max_seq_len, keep_tail=True)
    num_windows = min(export.calibration_windows, len(windows))
    calibration = evenly_spaced(windows, num_windows, "export_experts.calibration_windows")
    experts = record_routing(trained, calibration, identifier).experts
    usage = Usage(
        load=read_expert_load(ROUTER, trained.config),
        transitions=count_transitions(experts, trained.config.num_experts),
    )
    precisions = compare_precisions(trained, calibration)
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


def equal_weights(model: DWRTransformer, other: DWRTransformer) -> bool:
    """Whether both have the same tensors to the bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    run(main, __doc__)
