"""A DWR model for inference from an expert store, with resident or cached experts, and decoding.

Both run `expert_ffn` on the same tokens with equally aligned weights, so their logits are equal to the bit.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dynaroute.dwr.experts.cache import CachedExperts, ExpertCache
from dynaroute.dwr.experts.prefetch import Router
from dynaroute.dwr.experts.store import ExpertStore, model_without_weights
from dynaroute.dwr.model import DWRTransformer, KVCache
from dynaroute.training.nll import kl_divergence, nll


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
    """The model without its experts, in memory; `bind_experts` connects it to a cache."""
    model = model_without_weights(store.config)
    for layer in model.layers:
        del layer.moe.experts  # a submodule can only be replaced by a module
        # Shows the cache each token's state early enough to prefetch.
        layer.moe.router.register_forward_hook(
            lambda _, inputs, scores, moe=layer.moe: moe.experts.observe(inputs[0], moe.selection(scores))
        )
    model.load_state_dict(store.read_backbone(), assign=True)
    return model.requires_grad_(False).eval().to(device)


def bind_experts(model: DWRTransformer, cache: ExpertCache) -> None:
    """Connects a model from `load_backbone` to a cache of the same store, from which it takes its experts."""
    for index, layer in enumerate(model.layers):
        layer.moe.experts = CachedExperts(cache, index)


def routers(model: DWRTransformer) -> list[Router]:
    """What each layer chooses experts by, without its router's hooks: one would ask for a prediction again."""
    return [lambda state, moe=layer.moe: moe.selection(moe.router.forward(state)) for layer in model.layers]


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
    """The same passes as `greedy_decode`, with a given text [B, T] in place of the model's own choice.

    Yields logits: [B, prompt_tokens, V] for the prompt, then [B, 1, V] for every token after it.
    """
    cache = KVCache(model.config, text.shape[0], like=text.new_empty(0, dtype=torch.float32))
    for tokens in text.split([prompt_tokens, *[1] * (text.shape[1] - prompt_tokens)], dim=1):
        yield model(tokens, cache).logits


class Text(NamedTuple):
    """How a model reads and writes text."""

    encode: Callable[[str, bool], list[int]]  # a prompt, as a turn of a chat or not
    decode: Callable[[list[int]], str]
    stop: set[int]  # tokens that end a text
    allowed: Tensor  # int64, the tokens that may come


Forward = Callable[[list[int]], Tensor]  # tokens that follow those of the calls before to the last one's logits [V]


def start_text(model: DWRTransformer) -> Forward:
    """A forward pass over a new text, for `sample`. The model is resident, or its experts are bound to a cache."""
    weight = model.token_embedding.weight
    cache = KVCache(model.config, 1, like=weight)
    return lambda tokens: model(torch.tensor([tokens], device=weight.device), cache).logits[0, -1]


class Recording:
    """A forward pass that keeps the tokens and the logits of its first calls.

    Attributes:
        calls: tokens, and the logits [V] after the last of them, on the CPU.
    """

    def __init__(self, forward: Forward, most: int) -> None:
        """Keeps `most` calls."""
        self._forward, self._most = forward, most
        self.calls: list[tuple[list[int], Tensor]] = []

    def __call__(self, tokens: list[int]) -> Tensor:
        """See `Forward`."""
        logits = self._forward(tokens)
        if len(self.calls) < self._most:
            self.calls.append((tokens, logits.cpu()))
        return logits


class Inexactness(NamedTuple):
    """What inexact routing changed in a text."""

    tokens: int  # compared, each after all tokens before it
    kl: float  # KL(exact || inexact) of the next token, in nats, the mean over tokens
    perplexity: float  # of these tokens
    exact_perplexity: float  # likewise, with exact routing

    def __str__(self) -> str:
        """Part of a sentence."""
        perplexities = f"perplexity {self.perplexity:.4g}, exact {self.exact_perplexity:.4g}"
        return f"KL to exact routing {self.kl:.3g} nats per token, {perplexities}, over {self.tokens} tokens"


@torch.inference_mode()
def compare_routing(calls: list[tuple[list[int], Tensor]], following: list[int], exact: Forward) -> Inexactness:
    """Reads a text again with exact routing, in the same calls.

    Args:
        calls: of a `Recording` with inexact routing.
        following: the token after each of them.
        exact: a pass over a new text.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for (tokens, logits), token in zip(calls, following, strict=True):
        expected, target = exact(tokens).cpu()[None, None], torch.tensor([[token]])
        found = logits[None, None]  # [1, 1, V]
        sums += torch.stack([kl_divergence(expected, found)[0, 0], nll(found, target), nll(expected, target)])
    kl, own, exactly = (sums / len(following)).tolist()
    return Inexactness(len(following), kl, math.exp(own), math.exp(exactly))


@torch.inference_mode()
def sample(
    forward: Forward,
    positions: int,
    prompt: list[int],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
    allowed: Tensor,
) -> Iterator[int]:
    """Continues a prompt token by token, until the model has no more positions.

    Args:
        forward: of a new text.
        positions: of the model.
        prompt: at least one token.
        temperature: divides the logits; 0: always the most probable token.
        top_p: samples from the most probable tokens whose probabilities add up to this, at least one (nucleus
            sampling, Holtzman et al., 2020).
        generator: on the CPU, where tokens are sampled on any device.
        allowed: int64, ids that may come: a vocabulary that is padded, or has gaps, has others without text.
    """
    tokens, length = prompt, len(prompt)
    while length <= positions:
        logits = forward(tokens).cpu()[allowed]
        token = int(allowed[_choose(logits, temperature, top_p, generator)])
        yield token
        tokens, length = [token], length + 1


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Chooses the next token from its logits, 1-dimensional: an index into them."""
    if temperature == 0:
        return int(logits.argmax())
    probability, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    probability[1:][probability.cumsum(0)[:-1] >= top_p] = 0
    return int(tokens[torch.multinomial(probability, 1, generator=generator)])
