"""The base as a plain module: the computation of transformers' `Olmo2ForCausalLM`, without importing transformers.

That import takes seconds. Only `prepare_base` needs it; later stages read the folder that it wrote back into this
module. Modules, tensors and settings have transformers' names, so both load the same folder, and `DagForward` runs on
both.

    B batch   T tokens   D model   H heads   K head size   V vocabulary
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.machine import require_device
from dynaroute.training.checkpoints import load_weights


class RopeParameters(BaseModel):
    """Rotary positions; of other types than the default, the keys are transformers' business."""

    model_config = ConfigDict(extra="allow", frozen=True)

    rope_type: str
    rope_theta: float


class DecoderConfig(BaseModel):
    """The architecture, from config.json. A `Literal` lists all supported values; other keys are kept unread.

    Post-norm: a layer adds norm(attention(x)) and norm(MLP(x)). q_norm and k_norm span all heads of a layer.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    model_type: Literal["olmo2"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: float
    rope_parameters: RopeParameters
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    tie_word_embeddings: bool = False

    @property
    def head_size(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads


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
    try:
        config = DecoderConfig.model_validate(read_record(path))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        found = key if problem["type"] == "missing" else f"{key} = {problem['input']!r}"
        raise DynarouteError(f"{path}: {found}: {problem['msg']}") from error
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
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Decoder(config)
    load_weights(model, tensors, folder, assign=True)
    model.tie()
    return model.requires_grad_(False).eval().to(device)


class Decoder(nn.Module):
    """A causal language model with the parts of `Olmo2ForCausalLM`."""

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
            x = x + layer.post_attention_layernorm(layer.self_attn(x, *position))
            x = x + layer.post_feedforward_layernorm(layer.mlp(x))
        return self.norm(x)


class Layer(nn.Module):
    """The parts of one layer, which `Stack` calls."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads, self.layer_idx, self.scaling = config.num_attention_heads, index, config.head_size**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (RMSNorm(D, config.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] from [B, T, D], with cos and sin of the positions, [1, T, K]."""
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, T, K]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
        return self.o_proj(z.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] from [B, T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 whatever the dtype of x: float64 is rounded, as in transformers."""

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
        from transformers import Olmo2Config
        from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding

        return Olmo2RotaryEmbedding(Olmo2Config(**config.model_dump(exclude_unset=True)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys of all heads at their positions, [B, H, T, K], in their own dtype; cos and sin are [1, T, K]."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]).to(x.dtype)
