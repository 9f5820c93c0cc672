"""A tiny base, its text, its encoder's vectors and a trained variant, in files as the stages leave them."""

from pathlib import Path

import numpy as np
import small_tokens
import torch
from small_base import EMBEDDING, HEADS, LAYERS, SEQ_LEN, VOCABULARY, make_base
from small_settings import default_settings

from dynaroute.config import Settings
from dynaroute.config.dagformer import Variant
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.data.tokens.documents import spread_windows
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset
from dynaroute.pipeline.artifacts import sha256, write_json
from dynaroute.training.checkpoints import save_checkpoint

PREFIX, WINDOWS = 6, 11  # 11 windows are more than one batch of the stage, and not a whole number of them
RUN = "0123456789abcdef"
ORDER = np.random.default_rng(7).permutation(int(dag_mask(LAYERS, HEADS).sum())).tolist()  # of edges


def make_predictor(seed: int = 1, **knobs) -> StructurePredictor:
    """A predictor that wires every text differently, with a part of the gates shut."""
    torch.manual_seed(seed)
    small = {"predictor_hidden": 8, "rank": 2, "init_logit": 0.1, "tau_final": 0.5}
    variant = Variant.model_validate(tiny_settings().variant("P1").model_dump() | small | knobs)
    predictor = StructurePredictor(variant, LAYERS, HEADS, EMBEDDING).eval()
    for head in (predictor.u, predictor.v):
        torch.nn.init.normal_(head.weight)
    return predictor


def tiny_settings(**dagformer) -> Settings:
    sizes = {"seq_len": SEQ_LEN, "prefix_tokens": PREFIX, "eval_windows": WINDOWS}
    return default_settings(dagformer={**sizes, **dagformer})


def write_tokens(folder: Path, lengths: list[int], seed: int = 0) -> TokenShards:
    """A test split of documents with the given numbers of tokens, from the sources "ants" and "bees" in turn."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]
    return TokenShards(small_tokens.write_tokens(folder, VOCABULARY, sources=["ants", "bees"], test=documents), "test")


def make_windows(folder: Path, number: int = WINDOWS) -> Subset:
    """Windows within one document each, as `variant_windows` chooses them; there are 12."""
    shards = write_tokens(folder, [40, 9, 23, 70, 5, 60, 61, 40])
    return Subset(Windows(shards, SEQ_LEN, keep_tail=False), spread_windows(shards, SEQ_LEN, number))


def write_embeddings(folder: Path, windows: int = WINDOWS) -> None:
    files = {}
    for seed, name in enumerate(("test", "test_prefix")):
        vectors = np.random.default_rng(seed).normal(size=(windows, EMBEDDING)).astype("<f4")
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", vectors)
        files[name] = {"file": f"{name}.npy", "windows": windows, "sha256": sha256(folder / f"{name}.npy")}
    write_json(folder / "metadata.json", {"embedding_size": EMBEDDING, "files": files})


def write_variant(name: str, predictor: StructurePredictor, base: str = "base") -> None:
    """What the training of a variant leaves, in the working directory, where the base already is."""
    folder = Path("data/dagformer/train") / name
    save_checkpoint(folder / "predictor.safetensors", predictor.state_dict(), {"run": RUN, "step": 7})
    record = {"run": RUN, "variant": name, "knobs": predictor.variant.model_dump(), "embedding_size": EMBEDDING}
    record |= {"num_layers": LAYERS, "num_heads": HEADS, "base": base}
    identity = {"base": sha256(f"data/dagformer/train/{base}/model.safetensors")}
    write_json(folder / "run.json", record | {"identity": identity})


def write_all(settings: Settings) -> None:
    """Everything that the evaluation of a variant reads but the variant, in the working directory."""
    make_windows(Path("data/tokens") / settings.dagformer.corpus)
    make_base().save_pretrained("data/dagformer/train/base")
    write_json("data/dagformer/edge_order/base.json", {"order": ORDER})
    write_embeddings(Path("data/dagformer/embeddings/evaluation"))
