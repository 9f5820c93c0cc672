"""The base as a plain module: transformers' `Olmo2ForCausalLM`, `LlamaForCausalLM` and `Qwen3ForCausalLM`.

Importing transformers takes seconds. Only `prepare_base` needs it; later stages read the folder that it wrote back into
this module. Modules, tensors and settings have transformers' names, so both load the same folder, and `DagForward` runs
on both.

    B batch   T tokens   D model   H heads   G query heads of a key/value head   K head size   V vocabulary
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.machine import require_device
from dynaroute.training.checkpoints import load_weights


@dataclass(frozen=True)
class Architecture:
    """How the supported architectures differ."""

    pre_norm: bool  # x + f(norm(x)), for attention and MLP alike; else x + norm(f(x))
    qk_norm: Literal["layer", "head", None]  # RMS norm of q and of k: over all heads of the layer, or each head's own


ARCHITECTURES = {  # by transformers' model_type
    "olmo2": Architecture(pre_norm=False, qk_norm="layer"),
    "llama": Architecture(pre_norm=True, qk_norm=None),
    "qwen3": Architecture(pre_norm=True, qk_norm="head"),
}


class RopeParameters(BaseModel):
    """Rotary positions; of other types than the default, the keys are transformers' business."""

    model_config = ConfigDict(extra="allow", frozen=True)

    rope_type: str
    rope_theta: float


class DecoderConfig(BaseModel):
    """The sizes, from config.json. A `Literal` lists all supported values; other keys are kept unread."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    model_type: Literal["olmo2", "llama", "qwen3"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt | None = None
    max_position_embeddings: PositiveInt
    rms_norm_eps: float
    rope_parameters: RopeParameters
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: list[Literal["full_attention"]] | None = None
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        if self.attention_bias and not self.architecture.pre_norm:
            raise ValueError(f"attention_bias = True: must be False for {self.model_type}")
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"must divide num_attention_heads = {self.num_attention_heads}"
            raise ValueError(f"num_key_value_heads = {self.num_key_value_heads}: {allowed}")
        return self

    @property
    def architecture(self) -> Architecture:
        """The family that the model belongs to."""
        return ARCHITECTURES[self.model_type]

    @property
    def head_size(self) -> int:
        """K."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


def read_config(values: dict[str, Any], name: str) -> DecoderConfig:
    """The sizes in a transformers config; raises DynarouteError, which begins with `name`, if it is not supported."""
    try:
        return DecoderConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key, reason = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":  # it names its key
            raise DynarouteError(f"{name}: {reason}") from error
        found = key if problem["type"] == "missing" else f"{key} = {problem['input']!r}"
        raise DynarouteError(f"{name}: {found}: {reason}") from error


def load_base(folder: Path, device: str) -> "Decoder":
    """A base from a transformers folder, such as `prepare_base` writes, for inference, in the dtype of its files.

    Raises:
        DynarouteError: the device is not there, a file is missing or damaged, tensors do not fit the config, or the
            architecture is not supported.
    """
    require_device(device)
    path = folder / "config.json"
    if not path.is_file():
        raise DynarouteError(f"{folder}: no base model: run the stage prepare_base")
    config = read_config(read_record(path), str(path))
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        names = set(read_record(index)["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    for shard in (folder / name for name in sorted(names)):
        try:
            with safe_open(shard, framework="pt") as file:
                # Copies, because views would change with the file.
                tensors |= {key: file.get_tensor(key).to(device, copy=True) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DynarouteError(f"{shard}: cannot be read: {error}: run the stage prepare_base") from error
    return _assemble(config, tensors, folder).to(device)


def as_decoder(model: nn.Module, name: str) -> "Decoder":
    """A transformers model as a plain module that shares its weights, in their dtype; for inference.

    Of weights that were quantized, as in GGUF files, transformers saves no folder; this does.

    Raises:
        DynarouteError: the architecture is not supported; the error begins with `name`.
    """
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    return _assemble(read_config(values, name), model.state_dict(), name)


def _assemble(config: DecoderConfig, tensors: dict[str, Tensor], name: str | Path) -> "Decoder":
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Decoder(config)
    load_weights(model, tensors, name, assign=True)
    model.tie()
    return model.requires_grad_(False).eval()


class Decoder(nn.Module):
    """A causal language model with the parts of transformers' own."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Shares the embedding's weight with the head if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of all weights."""
        return self.lm_head.weight.device

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] in the dtype of the weights, from tokens [B, T] int64 without padding."""
        return self.lm_head(self.model(tokens))

    def save_pretrained(self, folder: Path) -> None:
        """Writes a folder that transformers and `load_base` read."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        config = self.config.model_dump(exclude_unset=True)
        write_json(folder / "config.json", config | {"dtype": str(self.dtype).removeprefix("torch.")})
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Stack(nn.Module):
    """All but the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # Not drawn: on the meta device normal_ would import torch._dynamo, which takes more than a second.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary_embedding(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """The last hidden states, after the final norm, [B, T, D]."""
        x = self.embed_tokens(tokens)
        position = self.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.layers:
            x = layer(x, *position)
        return self.norm(x)


class Layer(nn.Module):
    """Attention and MLP, each with its norm and its residual connection."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.pre_norm = config.architecture.pre_norm
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
        if self.pre_norm:  # the second is before the MLP, whatever it is called
            norms = ["input_layernorm", "post_attention_layernorm"]
        for name in norms:
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] from [B, T, D], with cos and sin of the positions, [1, T, K]."""
        if self.pre_norm:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        D, H, K, bias = config.hidden_size, config.num_attention_heads, config.head_size, config.attention_bias
        of_kv = config.num_key_value_heads * K
        self.layer_idx, self.scaling = index, K**-0.5
        self.qk_norm = config.architecture.qk_norm
        self.q_proj = nn.Linear(D, H * K, bias)
        self.k_proj, self.v_proj = (nn.Linear(D, of_kv, bias) for _ in range(2))
        self.o_proj = nn.Linear(H * K, D, bias)
        if self.qk_norm is not None:
            sizes = (K, K) if self.qk_norm == "head" else (H * K, of_kv)
            self.q_norm, self.k_norm = (RMSNorm(size, config.rms_norm_eps) for size in sizes)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] from [B, T, D], with cos and sin of the positions, [1, T, K]."""
        return self.o_proj(attend(self, self.qk_norm, self.q_proj(x), self.k_proj(x), self.v_proj(x), cos, sin))


def attend(
    attention: nn.Module, qk_norm: Literal["layer", "head", None], q: Tensor, k: Tensor, v: Tensor, *position: Tensor
) -> Tensor:
    """What heads attend to, [B, T, H*K], before `o_proj`; q [B, T, H*K], k and v [B, T, H/G*K].

    `attention` is this file's or transformers' own; `position` the cos and sin of the positions, [1, T, K].
    """
    if qk_norm == "layer":
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (x.unflatten(-1, (-1, position[0].shape[-1])) for x in (q, k, v))
    if qk_norm == "head":
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or H/G, T, K]
    q, k = rotate(q, *position), rotate(k, *position)
    if (shared := q.shape[1] // k.shape[1]) > 1:  # G
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
    return z.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        D, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj = nn.Linear(D, width, bias), nn.Linear(D, width, bias)
        self.down_proj = nn.Linear(width, D, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 whatever the dtype of x: float64 is rounded, as in transformers.

    Llama's and Qwen3's round to the dtype of x before they apply the weight too.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape and dtype of x, normed over the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Position p turns the pair (d, d + K/2) of a head by the angle p * theta^(-2d / K)."""

    def __init__(self, head_size: int, theta: float) -> None:
        super().__init__()
        inverse = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float) / head_size)
        self.register_buffer("inv_freq", inverse, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, float32 [1, T, K], at positions [1, T]; of x only the device counts."""
        angles = positions[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotary_embedding(config: DecoderConfig) -> nn.Module:
    """The plain rotary embedding, or transformers' own for a base that scales it, which costs the import."""
    with torch.device("cpu"):  # also where the weights are on the meta device: no file holds the frequencies
        if config.rope_parameters.rope_type == "default":
            return RotaryEmbedding(config.head_size, config.rope_parameters.rope_theta)
        from transformers import AutoConfig
        from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding  # as the others', but not rounded

        return Olmo2RotaryEmbedding(AutoConfig.for_model(**config.model_dump(exclude_unset=True)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys of all heads at their positions, [B, H, T, K], in their own dtype; cos and sin are [1, T, K]."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]).to(x.dtype)
