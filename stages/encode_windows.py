"""Encodes the windows that DAGFormer trains on and is scored on, once for all variants.

    python stages/encode_windows.py

The encoder is frozen, so a text's vector never changes. For the prefix protocol it reads the first
`dagformer.prefix_tokens` tokens of the test windows only.

Reads   data/tokens/<dagformer.corpus>; data/dagformer/base where dagformer.encoder.kind is base
Writes  data/dagformer/embeddings/   training/train.npy, validation.npy; evaluation/test.npy, test_prefix.npy
                                     (float32 [windows, E]); metadata.json beside them
"""

from pathlib import Path

import torch

from dynaroute.config import Settings
from dynaroute.dagformer.encoders import load_encoder, write_embeddings
from dynaroute.dagformer.windows import KEYS, Subset
from dynaroute.data.shards import TokenShards, Windows
from dynaroute.stage import run

DATA = Path("data/dagformer")


def main(settings: Settings) -> None:
    """Writes the embeddings."""
    torch.set_num_threads(settings.num_threads)
    dagformer = settings.dagformer
    tokens = Path("data/tokens") / dagformer.corpus
    shards = {split: TokenShards(tokens, split) for split in KEYS}
    windows = {
        split: Subset(Windows(own, dagformer.seq_len, keep_tail=False), getattr(dagformer, KEYS[split]))
        for split, own in shards.items()
    }
    encoder = load_encoder(dagformer.encoder, DATA / "base", shards["train"].tokenizer(), settings.device)
    # Apart, so that other windows to evaluate on do not retrain anything.
    held_out = {"test": windows.pop("test")}
    write_embeddings(encoder, dagformer.encoder, windows, None, DATA / "embeddings/training")
    write_embeddings(encoder, dagformer.encoder, held_out, dagformer.prefix_tokens, DATA / "embeddings/evaluation")


if __name__ == "__main__":
    run(main, __doc__)
