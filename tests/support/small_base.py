"""A tiny random base for tests, in which wiring matters."""

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

from dynaroute.dagformer.decoder import Decoder, DecoderConfig

VOCABULARY, EMBEDDING = 50, 12
LAYERS, HEADS = 3, 2
SEQ_LEN = 16


def make_base(seed: int = 0) -> Olmo2ForCausalLM:
    """The base, frozen."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": SEQ_LEN, "initializer_range": 0.3}
    config = Olmo2Config(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False)
    return Olmo2ForCausalLM(config).requires_grad_(False).eval()


def as_decoder(base: PreTrainedModel) -> Decoder:
    """The same model as a plain module, in the same dtype, frozen."""
    decoder = Decoder(DecoderConfig(**base.config.to_dict())).to(base.dtype)
    decoder.load_state_dict(base.state_dict())
    return decoder.requires_grad_(False).eval()
