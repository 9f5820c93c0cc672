"""Encodes the windows that DAGFormer trains on and is scored on, once for all variants.

    python stages/dagformer/encode_windows.py

The encoder is frozen, so a text's vector never changes. For the prefix protocol it reads the first
`dagformer.prefix_tokens` tokens of the test windows only.

Reads   data/tokens/<dagformer.corpus>; data/dagformer/train/base where dagformer.encoder.kind is base
Writes  data/dagformer/embeddings/   training/train.npy, validation.npy; evaluation/test.npy, test_prefix.npy
                                     (float32 [windows, E]); metadata.json beside them. domains/domains.npy, of
                                     windows of each source alone; without that file if there is but one source

A stopped run resumes from its progress in .scratch/encode_windows/.
"""

from pathlib import Path

import torch

from dynaroute.config import BaseEncoder, Settings
from dynaroute.dagformer.embeddings import write_embeddings
from dynaroute.dagformer.encoders import load_encoder
from dynaroute.data.tokens.documents import domain_windows
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.windows import KEYS, Selection, dagformer_windows
from dynaroute.pipeline.artifacts import sha256
from dynaroute.pipeline.machine import compute_dtype
from dynaroute.pipeline.scratch import exclusive, run_id, scratch_folder
from dynaroute.pipeline.stage import run

DATA = Path("data/dagformer")
BASE = DATA / "train/base"


def main(settings: Settings) -> None:
    """Writes the embeddings."""
    torch.set_num_threads(settings.num_threads)
    dagformer = settings.dagformer
    tokens = Path("data/tokens") / dagformer.corpus
    shards = {split: TokenShards(tokens, split) for split in KEYS}
    windows = dagformer_windows(shards, dagformer)
    dtype = compute_dtype(settings.device, dagformer.precision)
    encoder = load_encoder(dagformer.encoder, BASE, shards["train"].tokenizer(), settings.device, dtype)
    # Apart, so that other windows to evaluate on do not retrain anything.
    # The largest comes last: if the stage is killed after a folder is finished, DVC removes that one with the others.
    folders = {
        "domains": ({}, None),
        "evaluation": ({"test": windows["test"]}, dagformer.prefix_tokens),
        "training": ({split: windows[split] for split in ("train", "validation")}, None),
    }
    drawn = domain_windows(shards["test"], dagformer.seq_len, settings.analysis.domain_windows)
    if drawn is not None:
        folders["domains"][0]["domains"] = Selection(windows["test"].windows, drawn.windows)
    for name, (own, prefix_tokens) in folders.items():
        identity = {
            "windows": {split: len(part) for split, part in own.items()},
            "seq_len": dagformer.seq_len,
            "prefix_tokens": prefix_tokens,
            "encoder": dagformer.encoder.model_dump(),
            "device": settings.device,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "num_threads": settings.num_threads,
            "tokens": sha256(tokens / "metadata.json"),
            "base": sha256(BASE / "model.safetensors") if isinstance(dagformer.encoder, BaseEncoder) else None,
        }
        scratch = scratch_folder("encode_windows", run_id(identity))
        with exclusive(scratch):
            write_embeddings(encoder, identity, own, prefix_tokens, DATA / "embeddings" / name, scratch)


if __name__ == "__main__":
    run(main, __doc__)
