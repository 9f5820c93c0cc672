"""Where the base that a DAGFormer wires comes from: a small one pretrained here, or an existing one.

`prepare_base` saves either as an ordinary transformers folder, from which all other stages read it back with
`dynaroute.dagformer.decoder`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dynaroute.config import Settings
from dynaroute.config.dagformer import LoadedBase, NewBase
from dynaroute.dagformer.decoder import Decoder, as_decoder
from dynaroute.dagformer.hub import load_model, load_tokenizer
from dynaroute.data.tokens.shards import IGNORED_TARGET, TokenShards, Windows
from dynaroute.errors import DynarouteError
from dynaroute.training.loop import Batch, Trainer, steps_in_epochs
from dynaroute.training.nll import nll

if TYPE_CHECKING:
    from transformers import Olmo2ForCausalLM, PreTrainedTokenizerBase  # slow to import

SAMPLE = "The function returns 3.14159, or raises:\n\tdef naïve(x): return x ** 2  # Ω"  # two tokenizers differ on it


def new_base(settings: NewBase, vocab_size: int, max_seq_len: int, eot_id: int) -> "Olmo2ForCausalLM":
    """A small OLMo-2 with random weights, for pretraining."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    model = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            max_position_embeddings=max_seq_len,
            eos_token_id=eot_id,
            bos_token_id=None,
            pad_token_id=None,
            use_cache=False,
        )
    )
    nn.init.normal_(model.model.embed_tokens.weight, std=settings.embedding_std)
    for layer in model.model.layers:
        nn.init.constant_(layer.post_attention_layernorm.weight, settings.post_norm_weight)
        nn.init.constant_(layer.post_feedforward_layernorm.weight, settings.post_norm_weight)
    return model


def load_existing(
    wanted: LoadedBase, shards: TokenShards, corpus: str, seq_len: int
) -> "tuple[Decoder, PreTrainedTokenizerBase]":
    """A base that somebody trained, in fp32 on the CPU, and its tokenizer.

    Args:
        wanted: which one.
        shards: tokens that the base must be able to read.
        corpus: the name of their corpus, for errors.
        seq_len: of the windows.

    Raises:
        DynarouteError: it cannot be loaded, its architecture is not supported, or it does not fit tokens or windows.
    """
    name = f"dagformer.base.path: {wanted.path}"
    model = load_model(name, "AutoModelForCausalLM", wanted.place, "cpu", torch.float32, wanted.revision)
    model = as_decoder(model, name)
    config = model.config
    if config.vocab_size < shards.vocab_size:
        raise DynarouteError(
            f"{name} has {config.vocab_size} tokens, but those of corpus {corpus} go up to {shards.vocab_size}: "
            "tokenize the corpus with the base's tokenizer"
        )
    if config.max_position_embeddings < seq_len:
        raise DynarouteError(
            f"dagformer.seq_len = {seq_len}: must be at most {config.max_position_embeddings}, the positions of {name}"
        )
    if config.num_hidden_layers < 3:
        raise DynarouteError(
            f"{name} has {config.num_hidden_layers} layers: must have at least 3, so that a connection can skip one"
        )
    tokenizer = load_tokenizer(name, wanted.place, wanted.revision)
    (own,) = shards.tokenizer().encode_batch([SAMPLE])
    if tokenizer.encode(SAMPLE, add_special_tokens=False) != own.tolist():
        raise DynarouteError(f"{name} has another tokenizer than corpus {corpus}: tokenize the corpus with the base's")
    return model, tokenizer


class LanguageModelObjective:
    """Next-token NLL of a transformers language model, in nats per token."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean NLL of a batch."""
        loss = nll(model(batch.tokens).logits, batch.targets)
        return loss, {"loss": loss}

    def validation_sums(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """NLL and predicted tokens, summed."""
        losses = nll(model(batch.tokens).logits, batch.targets, "none")
        return {"nll": losses.double().sum(), "predicted": (batch.targets != IGNORED_TARGET).sum()}

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean NLL."""
        return {"loss": float(sums["nll"] / sums["predicted"])}


def make_trainer(
    settings: Settings, accelerator: Accelerator, shards: dict[str, TokenShards], scratch: Path
) -> Trainer:
    """The trainer of a new base on the training split; all of the validation split decides which weights are best.

    Raises:
        DynarouteError: the training does not fit the windows and processes.
    """
    wanted, seq_len, train = settings.dagformer.base, settings.dagformer.seq_len, shards["train"]
    training = Windows(train, seq_len, keep_tail=False)
    torch.manual_seed(settings.seed)
    return Trainer(
        new_base(wanted, train.padded_vocab_size, seq_len, train.eot_id),
        LanguageModelObjective(),
        training,
        Windows(shards["validation"], seq_len, keep_tail=True),
        wanted.training,
        total_steps=steps_in_epochs(wanted.training, len(training)),
        accelerator=accelerator,
        seed=settings.seed,
        scratch=scratch,
        early_stopping_patience=wanted.training.early_stopping_patience,
    )
