"""The base of the paper settings, from its configuration alone: shapes without memory, on the meta device."""

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from dynaroute.dagformer.gates import layer_distance
from dynaroute.dagformer.graph import DagForward

# config.json of allenai/OLMo-2-0425-1B
OLMO2_1B = {
    "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


def test_olmo2_1b_has_256_nodes_and_30720_gates():
    with torch.device("meta"):
        base = Olmo2ForCausalLM(Olmo2Config(**OLMO2_1B)).bfloat16()
        graph = DagForward(base)
    assert sum(parameter.numel() for parameter in base.parameters()) == 1_484_916_736
    assert graph.num_layers * graph.num_heads == 256
    distance = layer_distance(graph.num_layers, graph.num_heads)
    counts = [int(which.sum()) for which in (distance > 0, distance == 1, distance > 1)]
    assert counts == [30_720, 3_840, 26_880]
    assert all(buffer.dtype == torch.bfloat16 for name, buffer in graph.named_buffers() if name.startswith("w_qkv"))
