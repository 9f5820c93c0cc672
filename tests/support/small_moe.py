"""Small random Mixture-of-Experts checkpoints, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2}
_SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_DEEPSEEK = {"num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_shared_experts": 1}
_DEEPSEEK |= {"intermediate_size": 40, "moe_intermediate_size": 48, "n_routed_experts": 8, "topk_group": 1}
_DEEPSEEK |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_QWEN = {"intermediate_size": 40, "moe_intermediate_size": 48, "num_experts": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"intermediate_size": 48, "num_experts": 8}),
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 8}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "head_dim": 8, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "deepseek_v2": ("DeepseekV2", {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, "q_lora_rank": 24, "n_group": 2}),
}


def save_moe(
    folder: Path, kind: str = "olmoe", dtype: torch.dtype = torch.float32, shard: str = "5GB", **sizes
) -> Path:
    """Saves a model of a type in shards of at most a size, and returns its folder."""
    name, own = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **own, **sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def load_eager(folder: Path) -> transformers.PreTrainedModel:
    """The model as transformers loads it, in 32-bit floats, with its own eager experts."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
