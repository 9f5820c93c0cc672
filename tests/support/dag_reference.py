"""The formulas of `DagForward`'s docstring, node by node, as slowly as they are written there."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Olmo2ForCausalLM


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


def reference_forward(base: Olmo2ForCausalLM, tokens: Tensor, adjacency: Tensor, input_norm: str = "none") -> Tensor:
    """Logits [B, T, V]; tokens [B, T], adjacency [B, N, N]."""
    return torch.stack([_one_sequence(base, t, a, input_norm) for t, a in zip(tokens, adjacency, strict=True)])


def _one_sequence(base: Olmo2ForCausalLM, tokens: Tensor, A: Tensor, input_norm: str) -> Tensor:
    config, eps = base.config, base.config.rms_norm_eps
    H, T = config.num_attention_heads, len(tokens)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    embedding = base.model.embed_tokens.weight[tokens]
    heads: list[Tensor] = []  # node i = n * H + h, head h of layer n -> [T, D]
    mlps: list[Tensor] = []
    for n, layer in enumerate(base.model.layers):
        attention = layer.self_attn
        of_head = [w.weight.chunk(H) for w in (attention.q_proj, attention.k_proj, attention.v_proj)]
        q, k, v = [], [], []
        for h in range(H):
            j = n * H + h
            gated = torch.zeros_like(embedding)
            for i in range(n * H):
                head = heads[i]
                if input_norm == "rms_pre":
                    head = head / torch.sqrt((head * head).mean(-1, keepdim=True) + eps)
                gated = gated + A[i, j] * head
            if input_norm == "gate_mean" and n > 0:
                gated = gated / A[: n * H, j].mean()
            node_input = embedding + sum(mlps) + normed(gated, input_norm, eps)
            for out, weights in zip((q, k, v), of_head, strict=True):
                out.append(node_input @ weights[h].T)
        q = rms_norm(torch.cat(q, dim=-1), attention.q_norm.weight, eps).chunk(H, dim=-1)
        k = rms_norm(torch.cat(k, dim=-1), attention.k_norm.weight, eps).chunk(H, dim=-1)
        raw = []
        for h in range(H):
            query, key = (rotate(x[h], config.rope_parameters["rope_theta"]) for x in (q, k))
            scores = query @ key.T / query.shape[-1] ** 0.5
            z = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v[h]
            raw.append(z @ attention.o_proj.weight.chunk(H, dim=1)[h].T)
        norm = layer.post_attention_layernorm
        r = torch.sqrt((sum(raw) ** 2).mean(-1, keepdim=True) + eps)
        heads += [norm.weight * x / r for x in raw]
        x = embedding + sum(mlps) + sum(heads)
        x = layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        mlps.append(rms_norm(x, layer.post_feedforward_layernorm.weight, eps))
    x = rms_norm(embedding + sum(mlps) + sum(heads), base.model.norm.weight, eps)
    return base.lm_head(x)
