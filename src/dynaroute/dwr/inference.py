"""A DWR model for inference from an expert store, with resident or with cached experts, and greedy decoding.

Both models run `expert_ffn` on the same tokens with equally aligned weights, so their logits are equal to the bit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dynaroute.dwr.experts import CachedExperts, ExpertCache, ExpertStore
from dynaroute.dwr.experts.store import model_without_weights
from dynaroute.dwr.model import DWRTransformer, KVCache


def load_resident(store: ExpertStore) -> DWRTransformer:
    """The model with all of its weights copied into memory."""
    model = model_without_weights(store.config)
    tensors = store.read_backbone()
    for layer in range(store.config.num_layers):
        for expert in range(store.config.num_experts):
            weights = store.read(layer, expert)
            for name, tensor in weights._asdict().items():
                tensors[f"layers.{layer}.moe.experts.{expert}.{name}"] = tensor.clone()
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def load_cached(cache: ExpertCache) -> DWRTransformer:
    """The model with its backbone in memory and its experts fetched through the cache; its state dict has none."""
    model = model_without_weights(cache.store.config)
    for layer in model.layers:
        del layer.moe.experts  # a submodule cannot be replaced by what is none
    bind_experts(model, cache)
    model.load_state_dict(cache.store.read_backbone(), assign=True)
    return model.requires_grad_(False).eval()


def bind_experts(model: DWRTransformer, cache: ExpertCache) -> None:
    """Lets a model that `load_cached` made take its experts from another cache of the same store."""
    for index, layer in enumerate(model.layers):
        layer.moe.experts = CachedExperts(cache, index)


@torch.inference_mode()
def greedy_decode(model: DWRTransformer, prompt: Tensor, steps: int) -> Iterator[Tensor]:
    """Continues a prompt [B, T] with the most probable tokens, for `steps` tokens after the prompt's pass.

    Yields the logits of every forward pass: [B, T, V] for the prompt, then `steps` times [B, 1, V]. The token that
    each of them adds is `logits[:, -1].argmax(-1)`.
    """
    cache = KVCache(model.config, prompt.shape[0], like=model.token_embedding.weight)
    logits = model(prompt, cache).logits
    yield logits
    for _ in range(steps):
        logits = model(logits[:, -1:].argmax(-1), cache).logits
        yield logits
