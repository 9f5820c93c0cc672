"""The formulas of `DagForward`'s docstring, node by node, as slowly as they are written there."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE on one head's queries or keys, [T, K]."""
    T, K = x.shape
    frequency = theta ** (-torch.arange(0, K, 2, dtype=torch.float32) / K)
    angle = (torch.arange(T, dtype=torch.float32)[:, None] * frequency).repeat(1, 2)  # in fp32, as transformers has it
    left, right = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()


def normed(gated: Tensor, input_norm: str, eps: float) -> Tensor:
    if input_norm == "rms_post":
        return gated / torch.sqrt((gated * gated).mean(-1, keepdim=True) + eps)
    if input_norm == "ln_post":
        centred = gated - gated.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return gated


def reference_forward(base: PreTrainedModel, tokens: Tensor, adjacency: Tensor, input_norm: str = "none") -> Tensor:
    """Logits [B, T, V]; tokens [B, T], adjacency [B, N, N]."""
    return torch.stack([_one_sequence(base, t, a, input_norm) for t, a in zip(tokens, adjacency, strict=True)])


def _one_sequence(base: PreTrainedModel, tokens: Tensor, A: Tensor, input_norm: str) -> Tensor:
    config, eps = base.config, base.config.rms_norm_eps
    pre_norm = config.model_type in ("llama", "qwen3")
    H, T = config.num_attention_heads, len(tokens)
    G = H // config.num_key_value_heads
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    embedding = base.model.embed_tokens.weight[tokens]
    heads: list[Tensor] = []  # node i = n * H + h, head h of layer n -> [T, D]
    ungated: list[Tensor] = []  # MLPs, and biases of attention outputs
    for n, layer in enumerate(base.model.layers):
        attention = layer.self_attn
        inputs = []
        for j in range(n * H, (n + 1) * H):
            gated = torch.zeros_like(embedding)
            for i in range(n * H):
                head = heads[i]
                if input_norm == "rms_pre":
                    head = head / torch.sqrt((head * head).mean(-1, keepdim=True) + eps)
                gated = gated + A[i, j] * head
            if input_norm == "gate_mean" and n > 0:
                gated = gated / A[: n * H, j].mean()
            inputs.append(embedding + sum(ungated) + normed(gated, input_norm, eps))
        shared = [sum(inputs[h : h + G]) / G for h in range(0, H, G)]
        if pre_norm:
            weight = layer.input_layernorm.weight
            inputs, shared = ([rms_norm(x, weight, eps) for x in group] for group in (inputs, shared))
        q = linear(inputs, attention.q_proj)
        k, v = (linear(shared, projection) for projection in (attention.k_proj, attention.v_proj))
        if config.model_type == "olmo2":  # over all heads
            q = rms_norm(torch.cat(q, dim=-1), attention.q_norm.weight, eps).chunk(H, dim=-1)
            k = rms_norm(torch.cat(k, dim=-1), attention.k_norm.weight, eps).chunk(H // G, dim=-1)
        if config.model_type == "qwen3":
            q = [rms_norm(x, attention.q_norm.weight, eps) for x in q]
            k = [rms_norm(x, attention.k_norm.weight, eps) for x in k]
        raw = []
        for h in range(H):
            query, key = (rotate(x, config.rope_parameters["rope_theta"]) for x in (q[h], k[h // G]))
            scores = query @ key.T / query.shape[-1] ** 0.5
            z = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v[h // G]
            raw.append(z @ attention.o_proj.weight.chunk(H, dim=1)[h].T)
        if attention.o_proj.bias is not None:
            ungated.append(attention.o_proj.bias.expand_as(embedding))
        norm = layer.post_attention_layernorm
        if not pre_norm:
            r = torch.sqrt((sum(raw) ** 2).mean(-1, keepdim=True) + eps)
            raw = [norm.weight * x / r for x in raw]
        heads += raw
        x = embedding + sum(ungated) + sum(heads)
        if pre_norm:
            ungated.append(layer.mlp(rms_norm(x, norm.weight, eps)))
        else:
            ungated.append(rms_norm(layer.mlp(x), layer.post_feedforward_layernorm.weight, eps))
    x = rms_norm(embedding + sum(ungated) + sum(heads), base.model.norm.weight, eps)
    return base.lm_head(x)


def linear(inputs: list[Tensor], projection: nn.Linear) -> list[Tensor]:
    """The outputs of each head from an input of its own, [T, K]."""
    weights = projection.weight.chunk(len(inputs))
    biases = [0.0] * len(inputs) if projection.bias is None else projection.bias.chunk(len(inputs))
    return [x @ weight.T + bias for x, weight, bias in zip(inputs, weights, biases, strict=True)]
