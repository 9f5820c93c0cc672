"""The DAG forward: a frozen base whose attention heads are wired by an adjacency instead of the residual stream.

`DagForward` states the formulas. It knows nothing of predictors, data or training. The base's own modules are called,
but for projections of which every head has an input or an output of its own: their weights are read. Architectures
differ in the following, and `decoder.ARCHITECTURES` says which is which:

                      OLMo-2                      Llama                Qwen3
    norm of a layer   of its output: post-norm    of its input: pre-norm, in both
    a head sends      its share of the norm       W_o[:, h] z_h, in both
    norm of q and k   over all heads of a layer   none                 of each head
    biases            none                        of q, k, v and o     of q, k, v and o
                                                  and of the MLP
All may have fewer key/value heads than query heads, whose size need not be D / H in Llama and Qwen3.

    B batch   T tokens   D model   H query heads   G of them share a key/value head   K head size
    L layers   N nodes = L * H
    S senders of a layer = H + 1: its heads, and the increment that it adds to every later `base`, at a gate of 1

How it is fast. Mixing is bound by memory traffic: done layer by layer, every later layer reads a layer's head outputs
again. Here the triangle of (source layer, target layer) is cut into squares instead. Once layer n - 1 has sent, the
last s layers, s the largest power of two that divides n, are mixed into the next s layers at once:

    target      1 2 3 4 5 6 7
    source 0    1 2 2 4 4 4 4        8 layers; the number is n. Every pair lies in exactly one square, a square is
           1      2 2 4 4 4 4        one matrix product per token, and a layer is read about log2(L) times, not L.
           2        3 4 4 4 4        The backward pass visits the same squares in reverse. Nothing is concatenated:
           3          4 4 4 4        all layers send into one buffer and receive from another, [B, T, nodes, D].
           4            5 6 6
           5              6 6
           6                7
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynaroute.dagformer.decoder import ARCHITECTURES, Decoder, attend, read_config
from dynaroute.dagformer.gates import dag_mask
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # at run time only where bases are made: slow to import

InputNorm = Literal["none", "gate_mean", "rms_post", "ln_post", "rms_pre"]

_SCRATCH = 2**21  # elements of the intermediate product on a CPU, so that it stays in the cache
_TOKENS = 128  # normed at a time on a CPU, for the same reason


class DagForward(nn.Module):
    """Logits of a frozen base under a given wiring of its attention heads.

    For node j = (l, h), which is query head h of layer l and has index l * H + h, and with an adjacency A:

        base_l     = embedding + sum_{l' < l} mlp_l'                         never gated
        gated_j    = sum_{i: layer(i) < l} A[i, j] * head_i
        input_j    = base_l + gated_j                                        every head has an input of its own
        q          = W_q[h] input_norm(input_j)                              input_norm: pre-norm only
        k, v       = W_k input_norm(shared), W_v input_norm(shared)          shared: the mean of input_j over the G
                                                                             query heads that share them
                     then biases, q_norm and k_norm, RoPE and causal attention give z_h
        raw_h      = W_o[:, h] z_h
        head_(l,h) = raw_h                                                   pre-norm
                   = w * raw_h / sqrt(mean((sum_h raw_h)^2) + eps)           post-norm: w, eps are the base's, and
                                                                             every head takes its share
        mlp_l      = the base's, of base_l + sum_{l' <= l} sum_h head_(l',h), with its norm          not gated
        logits     = lm_head(norm(embedding + all mlp + all heads))                                  not gated

    The bias of W_o is no head's: it counts as part of mlp_l, but that MLP_l reads it too.

    With A = 1 and input_norm "none" or "gate_mean" this is the base model. Entries of A whose target does not lie in
    a later layer than their source are never read.

    `input_norm` changes gated_j alone, never base_l; eps is the base's rms_norm_eps:
        none       gated_j as above
        gate_mean  gated_j / mean_i A[i, j] over its valid sources i: only the proportions of the gates matter
        rms_post   gated_j / sqrt(mean_d gated_j^2 + eps)
        ln_post    (gated_j - mean_d gated_j) / sqrt(var_d gated_j + eps)
        rms_pre    sum_i A[i, j] * head_i / sqrt(mean_d head_i^2 + eps); the ungated sums use head_i as it is

    The base computes as in eval mode, without dropout. It is frozen in place (requires_grad False), and its weights
    must not change afterwards, because the q, k, v weights are stacked once, here; move or cast this module, not the
    base. With `trainable` it is the other way round: all of the base's parameters take gradients, and may change. A
    second backward pass through one forward raises DynarouteError where the first has overwritten what it needs: with
    `trainable`, and on a pre-norm base. The dtype of all work is the base's own: autocast is switched off inside.

    Args:
        base: the model, a `Decoder` or transformers' own.
        input_norm: see above.
        trainable: see above.

    Raises:
        DynarouteError: a base or an input_norm that is not supported.
    """

    def __init__(self, base: "PreTrainedModel | Decoder", input_norm: InputNorm = "none", trainable: bool = False):
        super().__init__()
        _check_base(base)
        if input_norm not in get_args(InputNorm):
            raise DynarouteError(f"input_norm = {input_norm!r}: must be one of {', '.join(get_args(InputNorm))}")
        self.base = base.requires_grad_(trainable)
        self.input_norm = input_norm
        self.trainable = trainable
        self.architecture = ARCHITECTURES[base.config.model_type]
        self.num_layers, self.num_heads = base.config.num_hidden_layers, base.config.num_attention_heads
        # With these, input_j is mixed as hidden - sum_i (1 - A[i, j]) * head_i, where hidden is the residual stream of
        # the base: the same sum, but at A = 1 nothing is left of it that rounds differently from the base.
        self._complement = input_norm in ("none", "gate_mean")
        self._spare: Tensor | None = None  # the buffer of a finished pass, for the next one
        self._stacked: list[list[str]] = []  # buffers, by layer
        for i in range(0 if trainable else self.num_layers):
            stacks = {f"w_{i}_{len(w)}": w for w in self._weights(i)}
            for name, w in stacks.items():
                self.register_buffer(name, w, persistent=False)
            self._stacked.append(list(stacks))

    def forward(self, tokens: Tensor, adjacency: Tensor) -> Tensor:
        """Computes logits; differentiable once with respect to the adjacency.

        Args:
            tokens: [B, T] token ids, every one a real token (no padding).
            adjacency: [B, N, N] of any float dtype.

        Returns:
            Logits [B, T, V] in the base's dtype.

        Raises:
            DynarouteError: the adjacency does not have the shape [B, N, N].
        """
        nodes = self.num_layers * self.num_heads
        if adjacency.shape != (len(tokens), nodes, nodes):
            expected = f"[{len(tokens)}, {nodes}, {nodes}] for these tokens and this base"
            raise DynarouteError(f"adjacency of shape {list(adjacency.shape)}: must be {expected}")
        with torch.autocast(tokens.device.type, enabled=False):
            return self._forward(tokens, adjacency)

    def _forward(self, tokens: Tensor, adjacency: Tensor) -> Tensor:
        model = self.base.model
        hidden = model.embed_tokens(tokens)  # the residual stream: as in the base, the ungated sum of everything
        B, T, D = hidden.shape
        position = model.rotary_emb(hidden, torch.arange(T, device=tokens.device)[None])
        gates = self._gates(adjacency)
        exchange = _Exchange(self, gates, hidden)
        base = increment = hidden
        for n, layer in enumerate(model.layers):
            weights = self._weights(n)
            norm = layer.input_layernorm if self.architecture.pre_norm else None
            if n == 0:  # base_0 is the embedding, and there is nothing to receive
                projected = _project(hidden.view(B * T, 1, D).expand(-1, self.num_heads, -1), norm, weights)
            elif self.input_norm in ("rms_post", "ln_post"):
                (gated,) = _Receive.apply(gates, increment, exchange, n, None)  # [B*T, H, D]
                normed = F.rms_norm if self.input_norm == "rms_post" else F.layer_norm
                projected = _project(base.view(B * T, 1, D) + normed(gated, (D,), eps=exchange.eps), norm, weights)
            elif self.trainable and norm is not None:  # whose weights' gradients are autograd's
                projected = _project(*_Receive.apply(gates, increment, exchange, n, None), norm, weights)
            else:
                projected = _Receive.apply(gates, increment, exchange, n, norm, *weights)
            hidden, attended, ungated = self._block(layer, projected, hidden, position, exchange)
            # What later layers get of this one ungated; that of layer 0 includes the embedding.
            if self._complement:
                increment = attended + ungated if n > 0 else hidden
            else:
                base = base + ungated
                increment = ungated if n > 0 else base
        return self.base.lm_head(model.norm(hidden))

    def _weights(self, n: int) -> list[Tensor]:
        """The weights of layer n's q, k and v, of each head together: [H, 3K, D]; or [H, K, D] and [H/G, 2K, D]."""
        if n < len(self._stacked):
            return [getattr(self, name) for name in self._stacked[n]]
        attention, of_kv = self.base.model.layers[n].self_attn, self.base.config.num_key_value_heads
        q = attention.q_proj.weight.unflatten(0, (self.num_heads, -1))
        k, v = (p.weight.unflatten(0, (of_kv, -1)) for p in (attention.k_proj, attention.v_proj))
        return [torch.cat([q, k, v], dim=1)] if of_kv == self.num_heads else [q, torch.cat([k, v], dim=1)]

    def _block(
        self, layer: nn.Module, projected: Sequence[Tensor], hidden: Tensor, position: Any, exchange: "_Exchange"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer after its projections: the new `hidden`, and what its heads add to it and what else, [B, T, D].

        The base's own computation step by step, but that every head sends its share of the attention.
        """
        attention, pre_norm, (B, T, _) = layer.self_attn, self.architecture.pre_norm, hidden.shape
        size = len(attention.q_proj.weight) // self.num_heads  # K
        qkv = (part.transpose(0, 1).reshape(B, T, -1) for x in projected for part in x.split(size, dim=-1))
        modules = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = (x if p.bias is None else x + p.bias for x, p in zip(qkv, modules, strict=True))
        z = attend(attention, self.architecture.qk_norm, *qkv, *position)  # [B, T, H*K]
        n, w_o, bias = attention.layer_idx, attention.o_proj.weight, attention.o_proj.bias
        norm = None if pre_norm else layer.post_attention_layernorm
        if n == self.num_layers - 1:  # nobody listens to its heads
            total = F.linear(z, w_o)
        elif exchange.in_one_pass:
            total = _send_in_one_pass(z, exchange, n, w_o, norm)
        else:
            w, eps = (None, None) if pre_norm else (norm.weight, norm.variance_epsilon)
            total = _Send.apply(z, exchange, n, w_o, w, eps)
        attended = total if pre_norm else norm(total)
        hidden = hidden + attended
        if bias is not None:
            hidden = hidden + bias
        if pre_norm:
            ungated = layer.mlp(layer.post_attention_layernorm(hidden))
        else:
            ungated = layer.post_feedforward_layernorm(layer.mlp(hidden))
        return hidden + ungated, attended, ungated if bias is None else ungated + bias

    def _gates(self, adjacency: Tensor) -> Tensor:
        """What senders are multiplied by, [B, (L-1)*S, (L-1)*H]: layers 0 .. L-2 send, layers 1 .. L-1 receive."""
        L, H = self.num_layers, self.num_heads
        if self.input_norm == "gate_mean":
            mask = dag_mask(L, H, adjacency.device)
            valid = adjacency.where(mask, 0)
            mean = valid.sum(-2, keepdim=True) / mask.sum(0).clamp(min=1)
            adjacency = valid / mean.where(mean > 0, 1)  # all gates shut: 0, not 0 / 0, and a finite gradient
        heads = adjacency.unflatten(1, (L, H))[:, :-1, :, H:]  # [B, L-1, H, (L-1)*H]
        ungated = torch.zeros_like if self.input_norm in ("rms_post", "ln_post") else torch.ones_like
        if self._complement:
            heads = heads - 1
        return torch.cat([heads, ungated(heads[:, :, :1])], dim=2).flatten(1, 2)


def _check_base(base: nn.Module) -> None:
    """Refuses what the forward would get wrong; RoPE variants and activations are the base's own modules."""
    config, name = getattr(base, "config", None), f"base of type {type(base).__name__}"
    if getattr(config, "model_type", None) not in ARCHITECTURES or not hasattr(base, "lm_head"):
        raise DynarouteError(f"{name}: must be a causal language model of type {', '.join(ARCHITECTURES)}")
    if not isinstance(base, Decoder):
        read_config(config.to_dict() | {"hidden_act": "silu"}, name)


class _Exchange:
    """What the layers of one forward pass send and receive, and the gradients of both; see the top of this file.

    gates     [B, (L-1)*S, (L-1)*H]
    sent      [B, T, (L-1)*S, D]     by layers 0 .. L-2
    received  [B, T, (L-1)*H, D]     by layers 1 .. L-1; the backward pass overwrites it with its gradient
    d_sent    as sent
    """

    def __init__(self, owner: DagForward, gates: Tensor, hidden: Tensor):
        B, T, D = hidden.shape
        self.L, self.H, self.S = owner.num_layers, owner.num_heads, owner.num_heads + 1
        self.eps = owner.base.config.rms_norm_eps
        self.normalise_sent = owner.input_norm == "rms_pre"
        self.first_sender = 0 if owner.trainable else 1  # layer 0 depends on no gate, but on weights
        # How heads are sent: a GPU, which is bound by their bytes, has products to spare for fewer passes over them.
        self.in_one_pass = hidden.is_cuda and not (owner.trainable or self.normalise_sent)
        self.gates = gates.detach().to(hidden.dtype)
        _, senders, receivers = gates.shape
        per_token = B * T * D
        sizes = [per_token * senders, per_token * receivers, max(_SCRATCH, D * senders, senders * receivers)]
        if torch.is_grad_enabled() and (gates.requires_grad or owner.trainable):
            sizes.append(per_token * senders)
        # A kernel hands out fresh memory page by page, which on a CPU costs as much as the mixing itself.
        buffer, owner._spare = owner._spare, None
        if buffer is None or (buffer.dtype, buffer.device) != (hidden.dtype, hidden.device) or len(buffer) < sum(sizes):
            buffer = hidden.new_empty(sum(sizes))
        weakref.finalize(self, setattr, owner, "_spare", buffer)  # when the graph of this pass is gone
        self.sent, self.received, self.scratch, *d_sent = buffer[: sum(sizes)].split(sizes)
        self.sent = self.sent.view(B, T, senders, D)
        self.received = self.received.view(B, T, receivers, D)
        self.d_sent = d_sent[0].view(B, T, senders, D) if d_sent else None
        self.d_gates: Tensor | None = None  # made by the backward pass

    def senders(self, start: int, stop: int | None = None) -> slice:
        """Where the layers start .. stop-1, or the one layer start, are in `sent`."""
        return slice(start * self.S, (stop or start + 1) * self.S)

    def heads(self, values: Tensor, n: int) -> Tensor:
        """What `values`, which is `sent` or `d_sent`, holds of the heads of layer n: a view, [B*T, H, D]."""
        return values[:, :, self.senders(n)].view(-1, self.S, values.shape[-1])[:, :-1]

    def receivers(self, start: int, stop: int | None = None) -> slice:
        """Where the layers start .. stop-1, or the one layer start, are in `received`."""
        return slice((start - 1) * self.H, ((stop or start + 1) - 1) * self.H)

    def mix(self, n: int) -> None:
        """Once layers 0 .. n-1 have sent: does the square that is due."""
        size = n & -n
        senders, receivers = self.senders(n - size, n), self.receivers(n, min(n + size, self.L))
        first = n == size  # else the square n - size was before this one, and wrote to all its receivers
        gates = self.gates[:, senders, receivers].transpose(1, 2)
        self._mix(self.received[:, :, receivers], gates, self.sent[:, :, senders], first)

    def mix_backward(self, n: int) -> None:
        """Once layers n .. L-1 have the gradient of what they received: goes back through the same square."""
        size = n & -n
        senders, receivers = self.senders(n - size, n), self.receivers(n, min(n + size, self.L))
        self._add_d_gates(self.d_gates[:, senders, receivers], self.sent[:, :, senders], self.received[:, :, receivers])
        if n > self.first_sender:
            senders = self.senders(max(n - size, self.first_sender), n)
            first = n + size >= self.L  # else the square n + size was before this one, and wrote to all its senders
            gates = self.gates[:, senders, receivers]
            self._mix(self.d_sent[:, :, senders], gates, self.received[:, :, receivers], first)

    def _mix(self, out: Tensor, gates: Tensor, values: Tensor, first: bool) -> None:
        """out (first: =, else: +=) gates @ values for every token; [B, T, i, D], [B, i, j], [B, T, j, D]."""
        for y, g, x in zip(out, gates, values, strict=True):
            if y.is_cuda:
                torch.baddbmm(y, g.expand(len(x), -1, -1), x, beta=0 if first else 1, out=y)
                continue
            # On the CPU a result that is not contiguous would fall back to one product after the other.
            for y_part, x_part in self._parts(y[0].numel(), y, x):
                product = self._temporary(*y_part.shape)
                torch.bmm(g.expand(len(x_part), -1, -1), x_part, out=product)
                y_part.copy_(product) if first else y_part.add_(product)

    def _add_d_gates(self, d_gates: Tensor, sent: Tensor, d_received: Tensor) -> None:
        """d_gates += sum over tokens of sent @ d_received^T; [B, i, j], [B, T, i, D], [B, T, j, D]."""
        for d_g, x, dy in zip(d_gates, sent, d_received, strict=True):
            for x_part, dy_part in self._parts(d_g.numel(), x, dy):
                products = self._temporary(len(x_part), *d_g.shape)
                torch.bmm(x_part, dy_part.transpose(1, 2), out=products)
                d_g.add_(products.sum(0, dtype=d_g.dtype))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products over all but the first dimension, [B*T, ...] -> [B*T, 1]."""
        parts = self._parts(x[0].numel(), x, y)
        return torch.cat([torch.mul(a, b, out=self._temporary(*a.shape)).flatten(1).sum(1) for a, b in parts])[:, None]

    def _parts(self, size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Cuts tensors along tokens, so that temporaries of `size` elements a token fit into `scratch`."""
        length = len(tensors[0]) if tensors[0].is_cuda else max(1, self.scratch.numel() // size)
        return zip(*(x.split(length) for x in tensors), strict=True)

    def _temporary(self, *shape: int) -> Tensor:
        """Memory until the next call: on the GPU the allocator's, on the CPU `scratch`, which stays in the cache."""
        if self.scratch.is_cuda:
            return self.scratch.new_empty(shape)
        return self.scratch[: math.prod(shape)].view(shape)


class _Send(torch.autograd.Function):
    """Layer n sends its heads. Returns the sum of the raw ones, [B, T, D]: the base's o_proj(z), without its bias.

    w [D] and eps are of a post-norm, and None on a pre-norm base, whose heads are sent raw.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, exchange: _Exchange, n: int, w_o: Tensor, w: Tensor | None, eps: float | None
    ) -> Tensor:
        B, T, _ = z.shape
        H, D = exchange.H, len(w_o)
        w_o = w_o.view(D, H, -1).permute(1, 2, 0)  # [H, K, D]
        heads = exchange.heads(exchange.sent, n)
        torch.bmm(z.view(B * T, H, -1).transpose(0, 1), w_o, out=heads.transpose(0, 1))
        total = heads.sum(1)  # [B*T, D]
        inverse = None
        if w is not None:
            inverse = torch.rsqrt(_wide(total).square().mean(-1, keepdim=True) + eps)  # [B*T, 1]
            heads.mul_((inverse * w)[:, None])
        ctx.inverse_of_head = None
        if exchange.normalise_sent:
            ctx.inverse_of_head = torch.rsqrt(_wide(heads).square().mean(-1, keepdim=True) + exchange.eps)
            heads.mul_(ctx.inverse_of_head)
        # z is for the gradients of w_o and w, which only a base that is trained asks for.
        ctx.save_for_backward(total, inverse, w_o, w, z if any(ctx.needs_input_grad[3:5]) else None)
        ctx.exchange, ctx.n = exchange, n
        return total.view(B, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        """By now all later layers have added to `d_sent` what they owe to these heads = w * raw * inverse, or raw."""
        total, inverse, w_o, w, z = ctx.saved_tensors
        exchange, (B, T, D) = ctx.exchange, d_total.shape
        H = exchange.H
        heads, d_heads = (exchange.heads(values, ctx.n) for values in (exchange.sent, exchange.d_sent))
        if exchange.normalise_sent:
            d_heads.sub_(heads * (heads * d_heads).mean(-1, keepdim=True)).mul_(ctx.inverse_of_head)
            heads = heads / ctx.inverse_of_head
        d_w, d_total = None, d_total.reshape(B * T, D)
        if ctx.needs_input_grad[4]:  # through raw * inverse, and not as head / w, which may be 0 / 0
            scaled = z.reshape(B * T, H, -1) * inverse[:, None]
            d_w = (w_o * torch.bmm(scaled.permute(1, 2, 0), d_heads.transpose(0, 1))).sum((0, 1))  # [H, K, D] -> [D]
        if w is None:
            d_raw = d_heads.add_(d_total[:, None])
        else:
            d_log_inverse = exchange.inner(heads, d_heads)  # [B*T, 1]
            d_total = d_total - d_log_inverse * inverse.square() / D * total
            scale = (inverse * w).to(total.dtype)
            d_raw = torch.addcmul(d_total.to(total.dtype)[:, None], d_heads, scale[:, None], out=d_heads)  # in place
        d_z = torch.bmm(d_raw.transpose(0, 1), w_o.transpose(1, 2))  # [H, B*T, K]
        d_w_o = None
        if ctx.needs_input_grad[3]:
            d_w_o = torch.bmm(z.reshape(B * T, H, -1).permute(1, 2, 0), d_raw.transpose(0, 1))  # [H, K, D]
            d_w_o = d_w_o.permute(2, 0, 1).reshape(D, -1)
        return d_z.transpose(0, 1).reshape(B, T, -1), None, None, d_w_o, d_w, None


def _send_in_one_pass(z: Tensor, exchange: _Exchange, n: int, w_o: Tensor, norm: nn.Module | None) -> Tensor:
    """What `_Send` computes, with the heads written once and the gradients at them read once, and nothing else done to
    them: `inverse`, the post-norm's factor for each token, is applied to z, and its weight w to W_o.

    head = (inverse * z_h) (w * W_o[:, h])^T. The gradient of `inverse` is then an inner product over z, of a head's
    size instead of H * D.
    """
    total = F.linear(z, w_o)
    if norm is not None:
        inverse = torch.rsqrt(_wide(total).square().mean(-1, keepdim=True) + norm.variance_epsilon)  # [B, T, 1]
        z, w_o = (z * inverse).to(z.dtype), w_o * norm.weight[:, None]
    return _SendScaled.apply(z, total, exchange, n, w_o.view(len(w_o), exchange.H, -1).permute(1, 2, 0))  # [H, K, D]


class _SendScaled(torch.autograd.Function):
    """Layer n sends the heads z_h w_o[h], of z [B, T, H*K] and w_o [H, K, D]. Returns `total` as it is.

    Whatever depends on these heads also depends on `total`: so by the time that the backward pass comes here, all
    later layers have added to `d_sent` what they owe to them.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, total: Tensor, exchange: _Exchange, n: int, w_o: Tensor) -> Tensor:
        B, T, _ = total.shape
        heads = exchange.heads(exchange.sent, n)
        torch.bmm(z.view(B * T, exchange.H, -1).transpose(0, 1), w_o, out=heads.transpose(0, 1))
        ctx.save_for_backward(w_o)
        ctx.exchange, ctx.n = exchange, n
        return total.view_as(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (w_o,) = ctx.saved_tensors
        exchange, (B, T, _) = ctx.exchange, d_total.shape
        d_heads = exchange.heads(exchange.d_sent, ctx.n)
        d_z = torch.bmm(d_heads.transpose(0, 1), w_o.transpose(1, 2))  # [H, B*T, K]
        return d_z.transpose(0, 1).reshape(B, T, -1), d_total, None, None, None


def _wide(x: Tensor) -> Tensor:
    """At least fp32, for sums of squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shared(inputs: Tensor, readers: int) -> Tensor:
    """What key/value heads read of the inputs of query heads, [B*T, H, D] -> [B*T, readers, D]: the mean of G."""
    return inputs if readers == inputs.shape[1] else inputs.unflatten(1, (readers, -1)).mean(2)


def _project(inputs: Tensor, norm: nn.Module | None, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs of query heads, [B*T, H, D], by weights [readers, x, D]: for each, [readers, B*T, x]."""
    if norm is not None and not inputs.is_cuda and len(inputs) > _TOKENS:
        parts = [_project(part, norm, weights) for part in inputs.split(_TOKENS)]
        return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    read = [_shared(inputs, len(w)) for w in weights]
    read = read if norm is None else [norm(x) for x in read]
    return tuple(torch.bmm(x.transpose(0, 1), w.transpose(1, 2)) for x, w in zip(read, weights, strict=True))


class _Receive(torch.autograd.Function):
    """Layer n-1 sends its increment, and layer n >= 1 receives. Returns `_project` of that; without weights, that."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor,
        increment: Tensor,
        exchange: _Exchange,
        n: int,
        norm: nn.Module | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        exchange.sent[:, :, exchange.senders(n - 1)][:, :, -1] = increment
        exchange.mix(n)
        received = exchange.received[:, :, exchange.receivers(n)].flatten(0, 1)  # [B*T, H, D], a view
        projected = _project(received, norm, weights) if weights else (received.clone(),)
        ctx.exchange, ctx.n, ctx.norm, ctx.weights, ctx.dtype = exchange, n, norm, weights, gates.dtype
        ctx.save_for_backward(*(projected if norm is not None else [None] * len(weights)))
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_projected: Tensor) -> tuple[Tensor | None, ...]:
        exchange, n, weights = ctx.exchange, ctx.n, ctx.weights
        needs = ctx.needs_input_grad[5:]
        if n == exchange.L - 1:  # the first to come
            if (any(needs) or ctx.norm is not None) and exchange.d_gates is not None:
                raise DynarouteError(
                    "a second backward pass through one forward: what its q, k and v received is overwritten by the "
                    "first: compute the forward again"
                )
            dtype = torch.promote_types(exchange.gates.dtype, torch.float32)
            exchange.d_gates = torch.zeros_like(exchange.gates, dtype=dtype)
        received = exchange.received[:, :, exchange.receivers(n)].flatten(0, 1)  # until it becomes its gradient
        d_weights: list[Tensor | None] = [None] * len(weights)
        if not weights:
            received.copy_(d_projected[0])
        else:
            reads = [_shared(received, len(w)) for w in weights]
            for i, (x, y, d_y, w) in enumerate(zip(reads, ctx.saved_tensors, d_projected, weights, strict=True)):
                if needs[i]:
                    d_weights[i] = torch.bmm(d_y.transpose(1, 2), x.transpose(0, 1))
                _overwrite_with_gradient(x, ctx.norm, w, y, d_y)
            for d_shared in reads[1:]:
                each = d_shared[:, :, None] * (d_shared.shape[1] / exchange.H)  # 1 / G
                received.unflatten(1, (d_shared.shape[1], -1)).add_(each)
        exchange.mix_backward(n)
        d_gates = exchange.d_gates.to(ctx.dtype) if n == 1 else None  # the last to come
        d_increment = None
        if n > exchange.first_sender:
            d_increment = exchange.d_sent[:, :, exchange.senders(n - 1)][:, :, -1].clone()
        return d_gates, d_increment, None, None, None, *d_weights


def _overwrite_with_gradient(x: Tensor, norm: nn.Module | None, w: Tensor, y: Tensor | None, d_y: Tensor) -> None:
    """Puts into x [B*T, h, D] the gradient at x, from d_y at y = norm(x) w^T; w [h, o, D], y and d_y [h, B*T, o].

    With norm(x) = v * x * r and r = 1 / sqrt(mean(x^2) + eps), that is  r * (d_y w v) - x * r^2 * (y . d_y) / D.
    """
    if norm is None:
        torch.bmm(d_y, w, out=x.transpose(0, 1))
        return
    D = x.shape[-1]
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) ** 2
    inverse = torch.rsqrt(square / D + norm.variance_epsilon).transpose(0, 1)  # [h, B*T, 1]
    inner = (_wide(y) * d_y).sum(-1, keepdim=True)
    x.mul_((inner * inverse.square() / -D).transpose(0, 1))
    x.transpose(0, 1).baddbmm_((d_y * inverse).to(x.dtype), w * norm.weight)
