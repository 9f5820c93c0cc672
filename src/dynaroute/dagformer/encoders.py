"""Frozen encoders, which turn windows of tokens into the vectors that predictors read.

B batch   t tokens read of a window   E embedding
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dynaroute.config.dagformer import BaseEncoder, HubEncoder
from dynaroute.dagformer.decoder import Decoder, load_base
from dynaroute.dagformer.hub import load_model, load_tokenizer
from dynaroute.data.tokens.tokenizers import Tokenizer
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class Encoder(Protocol):
    """What both encoders offer."""

    embedding_size: int  # E
    dtype: torch.dtype  # of its weights, and what it computes in

    def encode(self, tokens: Tensor) -> Tensor:
        """The vectors of windows, [B, E] float32 on the CPU, from their tokens, [B, t] int64."""

    def check(self, tokens: Tensor) -> None:
        """Raises DynarouteError if a window is too long for it; cheap beside `encode`."""


class BaseStates:
    """The base's own last hidden states, after its final norm, averaged over the tokens read."""

    def __init__(self, model: Decoder) -> None:
        """Takes the frozen base."""
        self.model = model
        self.embedding_size, self.dtype = model.config.hidden_size, model.dtype

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """See `Encoder`."""
        states = self.model.model(tokens.to(self.model.device))  # [B, t, E]
        return states.mean(1, dtype=torch.float32).cpu()

    def check(self, tokens: Tensor) -> None:
        """See `Encoder`. `prepare_base` has compared the base with the windows."""


class TextEncoder:
    """A text encoder, whose own tokenizer reads the text of a window: its last hidden states, averaged over its tokens.

    The tokenizer adds the special tokens that the encoder knows, and reads those in the text as such.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", corpus: Tokenizer, name: str
    ) -> None:
        """Takes a frozen encoder and the corpus's tokenizer; `name` is what errors call the encoder.

        Of a model that has a decoder too, such as T5, the encoder is used alone.

        Raises:
            DynarouteError: the encoder's tokenizer has nothing to pad with, or it does not encode text.
        """
        if tokenizer.pad_token is None:  # any token will do: the mask tells padding by place
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise DynarouteError(f"{name}: its tokenizer has neither pad_token nor eos_token, and one is needed")
        tokenizer.padding_side = "right"  # positions count from 0 in every text, whatever it is padded to
        self.model = model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.dtype = model.dtype
        self.tokenizer, self.corpus, self.name = tokenizer, corpus, name
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is None or positions <= 0:  # relative positions; -1 is XLNet's
            positions = tokenizer.model_max_length
        # RoBERTa and its kin count positions from after the padding token's.
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        if (padding := getattr(table, "padding_idx", None)) is not None:
            positions -= padding + 1
        self.max_tokens = min(positions, tokenizer.model_max_length)
        try:
            self.embedding_size = self.encode_texts(["a"]).shape[1]
        except Exception as error:  # whatever a model that is no text encoder comes across first
            reason = str(error).strip().partition("\n")[0]
            raise DynarouteError(f"{name}: does not encode text: {reason}") from error

    def encode(self, tokens: Tensor) -> Tensor:
        """See `Encoder`.

        Raises:
            DynarouteError: what `encode_texts` raises.
        """
        return self.encode_texts([self.corpus.decode(ids) for ids in tokens.tolist()])

    def check(self, tokens: Tensor) -> None:
        """See `Encoder`."""
        self._inputs([self.corpus.decode(ids) for ids in tokens.tolist()])

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """The vectors of texts, [B, E] float32 on the CPU.

        Raises:
            DynarouteError: a text has more tokens than the encoder can read, or none.
        """
        ids, mask = (tensor.to(self.model.device) for tensor in self._inputs(texts))  # [B, s]
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # [B, s, E]
        weights = mask[:, :, None] / mask.sum(1)[:, None, None]  # [B, s, 1]
        return (states * weights).sum(1).cpu()

    def _inputs(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        inputs = self.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt")
        mask = inputs["attention_mask"]  # [B, s]: 1 at a text's own tokens, 0 at padding
        lengths = mask.sum(1)
        if lengths.min() == 0:
            raise DynarouteError(f"{self.name}: its tokenizer finds no token in {texts[int(lengths.argmin())]!r}")
        if (longest := int(lengths.max())) > self.max_tokens:  # which may be 10^30
            raise DynarouteError(
                f"{self.name}: reads at most {self.max_tokens} tokens, but a window has {longest} of them: "
                "lower dagformer.seq_len"
            )
        return inputs["input_ids"], mask


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
        base: the base's directory; for the encoder of kind base.
        corpus: the tokenizer of the windows; for the encoder of kind hub.
        device: cpu or cuda.
        dtype: of the weights; for the encoder of kind hub. The base has the one that it was saved in.

    Raises:
        DynarouteError: the device is not there, or the encoder cannot be loaded, or its files lack weights, or it does
            not encode text.
    """
    if isinstance(settings, BaseEncoder):
        return BaseStates(load_base(base, device))
    name = f"dagformer.encoder.path: {settings.path}" + (f" at {settings.revision}" if settings.revision else "")
    model = load_model(name, "AutoModel", settings.place, device, dtype, settings.revision)
    return TextEncoder(model, load_tokenizer(name, settings.place, settings.revision), corpus, name)
