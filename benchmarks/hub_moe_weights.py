"""Random weights in the shape of OLMoE-1B-7B, a shard for each layer, and the copies that peers read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from accelerate.utils import offload_weight, save_offload_index
from torch import Tensor
from tqdm import tqdm
from transformers import OlmoeConfig

from dynaroute.dwr.experts.checkpoint import INDEX, Checkpoint
from dynaroute.dwr.experts.mapping import drop_from_page_cache
from dynaroute.dwr.experts.precision import TensorEntry
from dynaroute.dwr.experts.store import safetensors_header
from dynaroute.pipeline.artifacts import output_directory, write_json

BLOCK = 32  # weights that share a scale in llama.cpp's Q8_0
GGUF_NAMES = {  # of the tensors of a layer
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GGUF = "model.gguf"
PARTS = ("gate", "up", "down")


def expert_tensor(layer: int, expert: int, part: str) -> str:
    """The name of an expert's matrix in a checkpoint."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def shapes(config: OlmoeConfig) -> dict[str, dict[str, list[int]]]:
    """The tensors of every shard: one for what is outside of the layers, then one a layer."""
    d, f, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    outside = {
        "model.embed_tokens.weight": [vocabulary, d],
        "model.norm.weight": [d],
        "lm_head.weight": [vocabulary, d],
    }
    shards = {"model-outside.safetensors": outside}
    for layer in range(config.num_hidden_layers):
        own = {f"self_attn.{name}_proj": [d, d] for name in "qkvo"} | {f"self_attn.{name}_norm": [d] for name in "qk"}
        own |= {"input_layernorm": [d], "post_attention_layernorm": [d], "mlp.gate": [config.num_experts, d]}
        tensors = {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
        for expert in range(config.num_experts):
            tensors |= {expert_tensor(layer, expert, part): [f, d] for part in ("gate", "up")}
            tensors[expert_tensor(layer, expert, "down")] = [d, f]
        shards[f"model-layer{layer}.safetensors"] = tensors
    return shards


def write_checkpoint(folder: Path, config: OlmoeConfig, skew: float) -> None:
    """Writes a model in bf16, one tensor at a time in memory.

    The embeddings of all tokens share a direction, `skew` times as long as what tells them apart: through the routers,
    it makes some experts of every layer more popular than others. Matrices are parts of one long random vector.
    """
    generator = torch.Generator().manual_seed(0)
    largest = max(config.intermediate_size, config.hidden_size) * config.hidden_size
    pool = torch.randn(8 * largest, generator=generator).mul_(0.01).bfloat16()

    def weights(name: str, shape: list[int]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        if "embed" in name:
            common = skew * torch.randn(shape[1], generator=generator)
            return (torch.randn(shape, generator=generator) + common).bfloat16()
        size = shape[0] * shape[1]
        if size > largest:
            return torch.randn(shape, generator=generator).mul_(0.01).bfloat16()
        start = int(torch.randint(len(pool) - size, (), generator=generator))
        return pool[start : start + size]

    with output_directory(folder) as partial:
        weight_map = {}
        for file, tensors in tqdm(shapes(config).items(), desc="weights", unit="shard", disable=None):
            entries = {name: TensorEntry(shape=shape, dtype="BF16") for name, shape in tensors.items()}
            with (partial / file).open("wb") as shard:
                shard.write(safetensors_header(entries, {}))
                for name, shape in tensors.items():
                    shard.write(_bytes(weights(name, shape)))
            weight_map |= dict.fromkeys(tensors, file)
        write_json(partial / INDEX, {"metadata": {}, "weight_map": weight_map})
        config.save_pretrained(partial)


def write_offload(folder: Path, checkpoint: Checkpoint, config: OlmoeConfig) -> None:
    """Writes a checkpoint as accelerate's `disk_offload` writes a model, which would have to fit in memory."""
    index: dict[str, Any] = {}
    tensors = {name: [name] for name in checkpoint.places if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        for name, parts in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
            experts = range(config.num_experts)
            stacked = [expert_tensor(layer, expert, part) for expert in experts for part in parts]
            tensors[f"model.layers.{layer}.mlp.experts.{name}"] = stacked
    with output_directory(folder) as partial:
        for name, parts in tqdm(tensors.items(), desc="offload", unit="tensor", disable=None):
            tensor = torch.cat([_read(checkpoint, part) for part in parts])
            if len(parts) > 1:
                tensor = tensor.view(config.num_experts, -1, tensor.shape[-1])
            offload_weight(tensor, name, partial, index)
        save_offload_index(index, partial)


def write_gguf(folder: Path, checkpoint: Checkpoint, config: OlmoeConfig) -> None:
    """Writes a checkpoint for llama.cpp: matrices in Q8_0, except those of the routers, and no vocabulary."""
    tensors = list(_gguf_tensors(checkpoint, config))
    with output_directory(folder) as partial:
        writer = gguf.GGUFWriter(partial / GGUF, "olmoe")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        kind = gguf.GGMLQuantizationType.Q8_0
        for name, shape, _ in tensors:
            if _is_quantized(name):
                shape = [*shape[:-1], shape[-1] // BLOCK * (BLOCK + 2)]
                writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
            else:
                writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, parts in tqdm(tensors, desc="GGUF", unit="tensor", disable=None):
            convert = to_q8_0 if _is_quantized(name) else Tensor.float
            writer.write_tensor_data(torch.cat([convert(_read(checkpoint, part)) for part in parts]).numpy())
        writer.close()


def _gguf_tensors(checkpoint: Checkpoint, config: OlmoeConfig) -> Iterator[tuple[str, list[int], list[str]]]:
    """llama.cpp's tensors: name, shape, and those of a checkpoint that it holds in turn."""
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        yield f"{theirs}.weight", list(checkpoint.place(f"{ours}.weight").shape), [f"{ours}.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, theirs in GGUF_NAMES.items():
            name = f"model.layers.{layer}.{ours}.weight"
            yield f"blk.{layer}.{theirs}.weight", list(checkpoint.place(name).shape), [name]
        for part in PARTS:
            names = [expert_tensor(layer, expert, part) for expert in range(config.num_experts)]
            shape = [config.num_experts, *checkpoint.place(names[0]).shape]
            yield f"blk.{layer}.ffn_{part}_exps.weight", shape, names


def _is_quantized(name: str) -> bool:
    return "norm" not in name and "gate_inp" not in name


def to_q8_0(weights: Tensor) -> Tensor:
    """Weights [..., I] in llama.cpp's Q8_0, uint8 [..., I/32 * 34]: for 32 weights a scale in fp16, then int8."""
    blocks = weights.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    whole = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), whole.view(torch.uint8)], -1).flatten(-2)


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    place = checkpoint.place(name)
    checkpoint.read(name, tensor := torch.empty(place.shape, dtype=place.dtype))
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def forget(folder: Path) -> None:
    """Writes a folder's files to the disk, and drops their pages that are not in use."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            drop_from_page_cache(path)
