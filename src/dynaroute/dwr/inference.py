"""A DWR model for inference from an expert store, with resident or with cached experts, and decoding.

Both run `expert_ffn` on the same tokens with equally aligned weights, so their logits are equal to the bit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dynaroute.dwr.experts import CachedExperts, ExpertCache, ExpertStore
from dynaroute.dwr.experts.store import model_without_weights
from dynaroute.dwr.model import DWRTransformer, KVCache


def load_resident(store: ExpertStore, device: str = "cpu") -> DWRTransformer:
    """The model with all of its weights in memory."""
    model = model_without_weights(store.config)
    tensors = store.read_backbone()
    for layer in range(store.config.num_layers):
        for expert in range(store.config.num_experts):
            for name, tensor in store.read(layer, expert)._asdict().items():
                tensors[f"layers.{layer}.moe.experts.{expert}.{name}"] = tensor
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval().to(device)


def load_backbone(store: ExpertStore, device: str = "cpu") -> DWRTransformer:
    """The model without experts, in memory; `bind_experts` says where they come from."""
    model = model_without_weights(store.config)
    for layer in model.layers:
        del layer.moe.experts  # a submodule cannot be replaced by what is none
        # The seam at which a cache hears of a token's state in time to read ahead.
        layer.moe.router.register_forward_hook(
            lambda _, inputs, scores, moe=layer.moe: moe.experts.foresee(inputs[0], scores)
        )
    model.load_state_dict(store.read_backbone(), assign=True)
    return model.requires_grad_(False).eval().to(device)


def bind_experts(model: DWRTransformer, cache: ExpertCache) -> None:
    """Lets a model that `load_backbone` made take its experts from a cache of the same store."""
    for index, layer in enumerate(model.layers):
        layer.moe.experts = CachedExperts(cache, index)


@torch.inference_mode()
def greedy_decode(model: DWRTransformer, prompt: Tensor, steps: int) -> Iterator[Tensor]:
    """Continues a prompt [B, T] with the most probable tokens, for `steps` tokens after the prompt's pass.

    Yields the logits of every forward pass: [B, T, V] for the prompt, then `steps` times [B, 1, V]. The token that
    each of them adds is `logits[:, -1].argmax(-1)`.
    """
    cache = KVCache(model.config, prompt.shape[0], like=prompt.new_empty(0, dtype=torch.float32))
    logits = model(prompt, cache).logits
    yield logits
    for _ in range(steps):
        logits = model(logits[:, -1:].argmax(-1), cache).logits
        yield logits


@torch.inference_mode()
def read_text(model: DWRTransformer, text: Tensor, prompt_tokens: int) -> Iterator[Tensor]:
    """The same passes as `greedy_decode`, where a text [B, T] goes on itself, whatever the model would say.

    Yields logits: [B, prompt_tokens, V] for the prompt, then [B, 1, V] for every token after it.
    """
    cache = KVCache(model.config, text.shape[0], like=text.new_empty(0, dtype=torch.float32))
    for tokens in text.split([prompt_tokens, *[1] * (text.shape[1] - prompt_tokens)], dim=1):
        yield model(tokens, cache).logits


@torch.inference_mode()
def sample(
    model: DWRTransformer,
    prompt: list[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    allowed: Tensor,
) -> Iterator[int]:
    """Continues a prompt token by token, until the model has no more positions.

    Args:
        model: resident, or with its experts bound to a cache.
        prompt: at least one token.
        temperature: divides the logits; 0: always the most probable token.
        top_p: the most probable tokens whose probabilities add up to this, at least one, are drawn from (nucleus
            sampling, Holtzman et al., 2020).
        generator: on the CPU, where tokens are drawn whatever the device.
        allowed: int64, ids that may come: a vocabulary that is padded, or has gaps, has others without text.
    """
    weight = model.token_embedding.weight
    cache = KVCache(model.config, 1, like=weight)
    tokens = torch.tensor([prompt], device=weight.device)
    while cache.length + tokens.shape[1] <= model.config.max_seq_len:
        logits = model(tokens, cache).logits[0, -1].cpu()[allowed]
        token = int(allowed[_choose(logits, temperature, top_p, generator)])
        yield token
        tokens = torch.tensor([[token]], device=weight.device)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """An index into the logits, 1-dimensional, of the next token."""
    if temperature == 0:
        return int(logits.argmax())
    probability, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    probability[1:][probability.cumsum(0)[:-1] >= top_p] = 0
    return int(tokens[torch.multinomial(probability, 1, generator=generator)])
