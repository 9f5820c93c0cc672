"""Frozen encoders: from a window of tokens to the text vector that predictors read.

B batch   t tokens read of a window   s the encoder's own tokens   E embedding
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynaroute.config import BaseEncoder, HubEncoder
from dynaroute.dagformer.decoder import Decoder, load_base
from dynaroute.dagformer.embeddings import Encoder
from dynaroute.dagformer.hub import load_model, load_tokenizer
from dynaroute.data.tokens.tokenizers import Tokenizer
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class BaseStates:
    """The base's last hidden states, after its final norm, averaged over the tokens read."""

    def __init__(self, model: Decoder) -> None:
        """Takes the frozen base."""
        self.model = model
        self.embedding_size, self.dtype = model.config.hidden_size, model.dtype

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """See `Encoder`."""
        states = self.model.model(tokens.to(self.model.device))  # [B, t, E]
        return states.mean(1, dtype=torch.float32).cpu()


class TextEncoder:
    """A text encoder with a tokenizer of its own: its last hidden states, averaged over all tokens but padding.

    Windows are decoded to text first. Special tokens that the tokenizer adds, or finds in the text, count.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", corpus: Tokenizer, name: str
    ) -> None:
        """Takes a frozen encoder, its tokenizer, the corpus's tokenizer, and the name that errors use.

        Raises:
            DynarouteError: the encoder's tokenizer has no token to pad with.
        """
        if tokenizer.pad_token is None:  # any token will do: the mask marks padding by position
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise DynarouteError(f"{name}: its tokenizer has neither pad_token nor eos_token: padding needs one")
        tokenizer.padding_side = "right"  # so that positions count from 0 in every text
        self.model = model
        self.embedding_size: int = model.config.hidden_size
        self.dtype = model.dtype
        self.tokenizer, self.corpus, self.name = tokenizer, corpus, name
        positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        self.max_tokens = min(positions, tokenizer.model_max_length)

    def encode(self, tokens: Tensor) -> Tensor:
        """See `Encoder`.

        Raises:
            DynarouteError: what `encode_texts` raises.
        """
        return self.encode_texts([self.corpus.decode(ids) for ids in tokens.tolist()])

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """The vectors of texts, [B, E] float32 on the CPU.

        Raises:
            DynarouteError: a text has no tokens, or more than the encoder can read.
        """
        inputs = self.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt")
        mask = inputs["attention_mask"]  # [B, s]: 1 at a text's own tokens, 0 at padding
        lengths = mask.sum(1)
        if lengths.min() == 0:
            raise DynarouteError(f"{self.name}: its tokenizer finds no token in {texts[int(lengths.argmin())]!r}")
        if lengths.max() > self.max_tokens:
            raise DynarouteError(
                f"{self.name}: reads at most {self.max_tokens} tokens, but a window has {int(lengths.max())}: "
                "lower dagformer.seq_len"
            )
        ids, mask = inputs["input_ids"].to(self.model.device), mask.to(self.model.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [B, s, E]
        weights = mask[:, :, None] / mask.sum(1)[:, None, None]  # [B, s, 1]
        return (states * weights).sum(1).cpu()


def load_encoder(
    settings: BaseEncoder | HubEncoder,
    base: Path,
    corpus: Tokenizer,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Loads the encoder that `dagformer.encoder` names.

    Args:
        settings: which encoder.
        base: the base's folder; used by kind base.
        corpus: the tokenizer of the windows; used by kind hub.
        device: cpu or cuda.
        dtype: of the weights; used by kind hub. The base has the dtype that it was saved in.

    Raises:
        DynarouteError: the device is not there, the encoder cannot be loaded, or its files lack weights.
    """
    if isinstance(settings, BaseEncoder):
        return BaseStates(load_base(base, device))
    name = f"dagformer.encoder.path: {settings.path}" + (f" at {settings.revision}" if settings.revision else "")
    model = load_model(name, "AutoModel", settings.path, device, dtype, settings.revision)
    return TextEncoder(model, load_tokenizer(name, settings.path, settings.revision), corpus, name)
