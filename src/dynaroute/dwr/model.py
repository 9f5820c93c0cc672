"""The DWR transformer: post-norm, causal, with a top-k Mixture of Experts in place of every feed-forward layer.

Expert weights are reached through `fetch`, one small seam, so the same code runs with all experts resident and with
experts that a cache brings (`dynaroute.dwr.experts`). Training, losses over text and files are left to others.

    B batch, T tokens, S = B * T, D d_model, H heads, K = top_k, E experts, F d_ff, V (padded) vocabulary
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaroute.config.dwr import Balance, DWRArchitecture
from dynaroute.config.schema import Positive
from dynaroute.dwr.locality import SimulatedCache, choose_with_cache


class DWRConfig(DWRArchitecture):
    """Sizes of a model: the architecture of params.yaml and the vocabulary of the tokens.

    `balance` is how its training balances experts. Models and stores from before it was a setting have the default.
    """

    vocab_size: Positive
    balance: Balance = "auxiliary"

    def num_params(self) -> int:
        """All parameters: 259,712,096 at the paper's sizes."""
        return self._num_outside_experts() + self.num_layers * self.num_experts * self.num_params_per_expert()

    def num_active_params(self) -> int:
        """Parameters that one token passes, the whole token embedding included: 83,336,288 at the paper's sizes."""
        return self._num_outside_experts() + self.num_layers * self.top_k * self.num_params_per_expert()

    def num_params_per_expert(self) -> int:
        """Two matrices and two biases."""
        return 2 * self.d_model * self.d_ff + self.d_ff + self.d_model

    def _num_outside_experts(self) -> int:
        d = self.d_model
        embeddings = 2 * self.vocab_size * d + self.max_seq_len * d
        layer = 4 * (d * d + d) + 2 * 2 * d + (d + 1) * self.num_experts  # attention, two LayerNorms, router
        return embeddings + self.num_layers * layer + 2 * d


class ExpertWeights(NamedTuple):
    """One expert's tensors, stored (in, out): a decode step is then a row of sequential reads."""

    w1: Tensor  # [D, F]
    b1: Tensor  # [F]
    w2: Tensor  # [F, D]
    b2: Tensor  # [D]


def expert_ffn(x: Tensor, weights: ExpertWeights) -> Tensor:
    """`gelu(x w1 + b1) w2 + b2` for the tokens [S', D] of one expert: the one function that resident and cached run."""
    hidden = F.gelu(torch.addmm(weights.b1, x, weights.w1))  # [S', F]
    return torch.addmm(weights.b2, hidden, weights.w2)  # [S', D]


class ExpertSource(Protocol):
    """Where a layer's experts come from."""

    def fetch(self, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yields each needed expert once, in any order; its weights are valid until the next one is asked for."""

    def preference(self) -> Tensor | None:
        """What is added to the scores [S, E] by which experts are chosen, [E]; None if routing is exact."""


class ResidentExperts(nn.Module):
    """The experts of one layer as separate parameters.

    Not one stacked tensor: the gradient of `stacked[e]` is a full-size tensor of zeros for every expert.
    """

    def __init__(self, config: DWRConfig) -> None:
        super().__init__()
        d, f = config.d_model, config.d_ff
        shapes = {"w1": (d, f), "b1": (f,), "w2": (f, d), "b2": (d,)}
        for expert in range(config.num_experts):
            weights = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
            self.add_module(str(expert), weights)

    def fetch(self, needed: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """Yields the needed experts in the order given."""
        for expert in needed:
            weights = self._modules[str(expert)]
            yield expert, ExpertWeights(weights["w1"], weights["b1"], weights["w2"], weights["b2"])

    def preference(self) -> None:
        """All experts are at hand, so none is preferred."""

    def run_all(self, x: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        """Every expert on its tokens at once, without a look at how many they are, for which a GPU would be waited for.

        Args:
            x: [S', D], sorted by expert.
            expert: [S'] int64, whose each is.
            counts: [E] int64, how many each has.

        Returns:
            [S', D], in the dtype of x, like all of the work.
        """
        num_experts = len(self._modules)
        every = zip(*(weights for _, weights in self.fetch(list(range(num_experts)))), strict=True)
        w1, b1, w2, b2 = (torch.stack(tensors).to(x.dtype) for tensors in every)  # [E, ...]
        ends = counts.cumsum(0, dtype=torch.int32)
        # Biases by a product too: picked by index, a thousand tokens' gradients would be added to each one by one.
        owner = (expert[:, None] == torch.arange(num_experts, device=x.device)).to(x.dtype)  # [S', E]
        hidden = F.gelu(torch.addmm(F.grouped_mm(x, w1, offs=ends), owner, b1))  # [S', F]
        return torch.addmm(F.grouped_mm(hidden, w2, offs=ends), owner, b2)


class RouterStatistics(NamedTuple):
    """What one layer's router did with S tokens."""

    balance_loss: Tensor  # scalar with gradient; top_k when routing is uniform
    counts: Tensor  # [E] int64, tokens assigned to each expert
    probability: Tensor  # [B, T, E]
    dropped: Tensor  # scalar int64, assignments over capacity
    chosen: Tensor  # [B, T, K] int64, each token's experts, the first choice first
    weight: Tensor  # [E, D], the router's own, without gradient
    scores: Tensor  # [B, T, E], its output, with gradient


class DWROutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor  # [B, T, V]
    router: list[RouterStatistics]  # a layer each


class _Gather(torch.autograd.Function):
    """`x[index]` where every row is taken `copies` times, and a backward pass without atomic adds.

    `inverse` lists, for row 0's copies, then row 1's, ..., where they went.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        gathered = gradient.index_select(0, inverse)  # [rows * copies, D]
        if ctx.copies > 1:
            gathered = gathered.view(-1, ctx.copies, gathered.shape[-1]).sum(1)
        return gathered, None, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In which a matrix product with x is done."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class MoE(nn.Module):
    """Top-k routing; tokens are sorted by expert, and experts without tokens cost nothing.

    The probabilities of the chosen experts, renormalised to sum to one, weigh their outputs. With top_k = 1 it is the
    probability itself, as in the Switch Transformer: renormalised it would be 1 whatever the router says, and no
    gradient of the NLL would reach the router.

    With `balance: loss_free` the experts of a token are those whose router score plus `selection_bias` is largest
    (Wang et al., 2024); probabilities, and so the weights of outputs, are those of the scores alone.

    Attributes:
        assigned: [E], tokens of the balance window that each expert got; None with `balance: auxiliary`. Saved with
            the weights, since a resumed training needs it.
        selection_bias: [E], in logits; None unless `balance: loss_free`.
    """

    def __init__(self, config: DWRConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.d_model, config.num_experts)
        self.experts: ExpertSource = ResidentExperts(config)
        counted, biased = config.balance != "auxiliary", config.balance == "loss_free"
        self.register_buffer("assigned", torch.zeros(config.num_experts) if counted else None)
        self.register_buffer("selection_bias", torch.zeros(config.num_experts) if biased else None)

    def selection(self, scores: Tensor) -> Tensor:
        """The scores by which experts are chosen, from those of the router, both [S, E]: the same if nothing is added.

        A bias of training is part of the model. A preference for experts that a cache holds is not: it is inexact.
        """
        for added in (self.selection_bias, self.experts.preference()):
            scores = scores if added is None else scores + added
        return scores

    def forward(self, x: Tensor, simulated: SimulatedCache | None = None) -> tuple[Tensor, RouterStatistics]:
        """[B, T, D] -> [B, T, D] and the router's statistics; a simulated cache favours the experts it holds."""
        batch, time, d = x.shape
        top_k, num_experts = self.config.top_k, self.config.num_experts
        x = x.reshape(-1, d)  # [S, D]
        scores = self.router(x)  # [S, E]
        probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # not in bf16
        selection = self.selection(scores)
        if simulated is None and selection is scores:
            weights, chosen = probabilities.topk(top_k)  # [S, K]
        else:
            if simulated is None:
                chosen = selection.topk(top_k).indices
            else:
                chosen = choose_with_cache(selection.view(batch, time, -1), top_k, simulated).view(-1, top_k)
            weights = probabilities.gather(1, chosen)
        if top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        # Not bincount, for whose size a GPU is waited for.
        counts = (chosen.reshape(-1, 1) == torch.arange(num_experts, device=x.device)).sum(0)  # [E]
        y = self.dispatch(x, weights, chosen, counts)  # [S, D]

        share = counts / x.shape[0]  # [E], sums to top_k
        if self.config.balance == "auxiliary_accumulated" and self.training:
            share = self.assigned + counts
            share = top_k * share / share.sum()
        balance_loss = num_experts * (share * probabilities.mean(0)).sum()
        dropped = (counts - self.capacity(x.shape[0])).clamp(min=0).sum()
        statistics = RouterStatistics(
            balance_loss,
            counts,
            probabilities.detach().view(batch, time, num_experts),
            dropped,
            chosen.view(batch, time, top_k),
            self.router.weight.detach(),
            scores.view(batch, time, num_experts),
        )
        return y.view(batch, time, d), statistics

    def dispatch(self, x: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """Runs the tokens x [S, D] through their experts: `chosen` [S, K], `weights` [S, K], `counts` [E] of each.

        Returns:
            The weighted sums [S, D].
        """
        top_k = self.config.top_k
        order = chosen.flatten().argsort(stable=True)  # [S*K], assignments sorted by expert, then token
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        at_once = self._run_at_once(x)
        if at_once:
            x = x.to(_compute_dtype(x))  # before it is copied
        sorted_x = _Gather.apply(x, order // top_k, inverse, top_k)  # [S*K, D]
        if at_once:
            sorted_y = self.experts.run_all(sorted_x, chosen.flatten()[order], counts)  # [S*K, D]
        else:
            sorted_y = self._run_experts(sorted_x, counts.tolist())  # [S*K, D]
        y = _Gather.apply(sorted_y, inverse, order, 1).view(-1, top_k, x.shape[-1])  # [S, K, D]
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)  # [S, D], always summed in top-k order

    def _run_at_once(self, x: Tensor) -> bool:
        """Whether `ResidentExperts.run_all` takes the place of a loop: in bf16 on a GPU, which a loop keeps waiting.

        Experts without tokens then have a gradient of zero, not none.
        """
        dropless = self.config.capacity_factor is None or not self.training
        resident = isinstance(self.experts, ResidentExperts)
        return resident and dropless and x.is_cuda and _compute_dtype(x) == torch.bfloat16

    def capacity(self, tokens: int) -> int:
        """Assignments that one expert takes of a batch of `tokens`; all of them when dropless.

        Only training drops tokens: otherwise a text's logits would depend on what it is batched with.
        """
        if self.config.capacity_factor is None or not self.training:
            return tokens
        fair_share = tokens * self.config.top_k / self.config.num_experts
        return min(tokens, math.ceil(self.config.capacity_factor * fair_share))

    def _run_experts(self, x: Tensor, counts: list[int]) -> Tensor:
        """Each expert on its slice of the sorted tokens [S*K, D]; the overflow of a full expert gives zeros."""
        slices = dict(enumerate(x.split(counts)))
        capacity = self.capacity(x.shape[0] // self.config.top_k)
        outputs: dict[int, Tensor] = {}
        needed = sorted((expert for expert, count in enumerate(counts) if count), key=counts.__getitem__)
        for expert, weights in self.experts.fetch(needed):  # the most used last: a cache keeps those
            overflow = max(0, counts[expert] - capacity)
            # Slicing costs a gradient-sized fill even where it takes all.
            kept = slices[expert][:capacity] if overflow else slices[expert]
            y = expert_ffn(kept, weights)
            outputs[expert] = F.pad(y, (0, 0, 0, overflow)) if overflow else y
            del weights  # a cache may need their place for the next
        return torch.cat([outputs[expert] for expert in sorted(outputs)])


class KVCache:
    """Keys and values of the tokens so far, for decoding; `[B, H, max_seq_len, D/H]` a layer, allocated once."""

    def __init__(self, config: DWRConfig, batch_size: int, like: Tensor) -> None:
        shape = (batch_size, config.num_heads, config.max_seq_len, config.d_model // config.num_heads)
        self.keys = [like.new_empty(shape) for _ in range(config.num_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_layers)]
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens' [B, H, T, D/H]; returns those of all tokens, [B, H, length + T, D/H]."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention with biases."""

    def __init__(self, config: DWRConfig, layer: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.layer = layer
        self.q, self.k, self.v, self.out = (nn.Linear(config.d_model, config.d_model) for _ in range(4))

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, x are the tokens that follow the cached ones."""
        batch, time, d = x.shape
        q, k, v = (
            project(x).view(batch, time, self.num_heads, -1).transpose(1, 2)  # [B, H, T, D/H]
            for project in (self.q, self.k, self.v)
        )
        mask, causal = None, True
        if cache is not None and cache.length:
            k, v = cache.extend(self.layer, k, v)
            # A single new token sees everything; several see what is cached and, causally, each other.
            causal = False
            if time > 1:
                mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        elif cache is not None:
            cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(batch, time, d))


class Block(nn.Module):
    """`x = LN(x + attention(x))`, then `x = LN(x + moe(x))`."""

    def __init__(self, config: DWRConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.moe = MoE(config)
        self.moe_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cache: KVCache | None, simulated: SimulatedCache | None
    ) -> tuple[Tensor, RouterStatistics]:
        """[B, T, D] -> [B, T, D] and the router's statistics."""
        x = self.attention_norm(x + self.dropout(self.attention(x, cache)))
        y, statistics = self.moe(x, simulated)
        return self.moe_norm(x + self.dropout(y)), statistics


class DWRTransformer(nn.Module):
    """Tokens to logits, through blocks whose feed-forward part is a Mixture of Experts."""

    def __init__(self, config: DWRConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02) for all matrices, zero biases, LayerNorm at one and zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif "norm" in name and name.endswith("weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, simulated: SimulatedCache | None = None
    ) -> DWROutput:
        """Logits for tokens [B, T]; with a cache, for the tokens that follow those it holds, which it then holds too.

        With a simulated cache of experts, routing is that of cache-aware inference, from the first of these tokens on.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens; the model has {self.config.max_seq_len} positions")
        positions = torch.arange(start, end, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # [B, T, D]
        router = []
        for layer in self.layers:
            x, statistics = layer(x, cache, simulated)
            router.append(statistics)
        if cache is not None:
            cache.length = end
        return DWROutput(self.output(self.norm(x)), router)
