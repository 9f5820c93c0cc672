"""Encodes a part of the windows that DAGFormer trains on or is scored on, once for all variants.

    python stages/dagformer/encode_windows.py training        (or evaluation, or domains)

The encoder is frozen, so a text's vector never changes.

    training     the windows that variants train on and are validated on: train.npy, validation.npy
    evaluation   those they are scored on: test.npy; for the prefix protocol test_prefix.npy, where the encoder reads
                 the first dagformer.prefix_tokens tokens alone
    domains      windows of each source alone, for analyze_topology: domains.npy; no file if there is but one source

Reads   data/tokens/<dagformer.corpus>; data/dagformer/train/base where dagformer.encoder.kind is base
Writes  data/dagformer/embeddings/<part>/   these files (float32 [windows, E]) and metadata.json

A run that was stopped resumes from .scratch/encode_windows/.
"""

from pathlib import Path

import torch

from dynaroute.config import Settings
from dynaroute.config.dagformer import BaseEncoder
from dynaroute.dagformer.embeddings import write_embeddings
from dynaroute.dagformer.encoders import load_encoder
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.locate import locate
from dynaroute.data.tokens.documents import domain_windows
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256
from dynaroute.pipeline.machine import compute_dtype
from dynaroute.pipeline.scratch import exclusive, run_id, scratch_folder
from dynaroute.pipeline.stage import run

DATA = Path("data/dagformer")
BASE = DATA / "train/base"
SPLITS = {"training": ("train", "validation"), "evaluation": ("test",), "domains": ("test",)}


def main(settings: Settings, part: str) -> None:
    """Writes the embeddings of one part."""
    if part not in SPLITS:
        raise DynarouteError(f"{part}: no part of the windows; known: {', '.join(SPLITS)}")
    torch.set_num_threads(settings.num_threads)
    dagformer = settings.dagformer
    located = locate(dagformer.encoder, "dagformer.encoder")  # first: what is not here is not asked of the hub
    tokens = Path("data/tokens") / dagformer.corpus
    shards = {split: TokenShards(tokens, split) for split in SPLITS[part]}
    if part == "domains":
        whole = Windows(shards["test"], dagformer.seq_len, keep_tail=False)
        drawn = domain_windows(shards["test"], dagformer.seq_len, settings.analysis.domain_windows)
        windows = {} if drawn is None else {"domains": Subset(whole, drawn.windows)}
    else:
        windows = {split: variant_windows(own, dagformer) for split, own in shards.items()}
    prefix_tokens = dagformer.prefix_tokens if part == "evaluation" else None
    dtype = compute_dtype(settings.device, dagformer.precision)
    corpus = next(iter(shards.values())).tokenizer()
    encoder = load_encoder(dagformer.encoder, BASE, corpus, settings.device, dtype)
    identity = {
        "windows": {split: len(own) for split, own in windows.items()},
        "seq_len": dagformer.seq_len,
        "prefix_tokens": prefix_tokens,
        "encoder": dagformer.encoder.model_dump() | located,
        "device": settings.device,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "num_threads": settings.num_threads,
        "tokens": sha256(tokens / "metadata.json"),
        "base": sha256(BASE / "model.safetensors") if isinstance(dagformer.encoder, BaseEncoder) else None,
    }
    scratch = scratch_folder("encode_windows", run_id(identity))
    with exclusive(scratch):
        write_embeddings(encoder, identity, windows, prefix_tokens, DATA / "embeddings" / part, scratch)


if __name__ == "__main__":
    run(main, __doc__, "part")
