"""The frozen language model that a DAGFormer wires: a small one pretrained here, or one that exists.

Whatever it came from, it is kept as an ordinary transformers directory, and everything loads it from there.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaroute.config import PretrainedBase
from dynaroute.dagformer.hub import load_model
from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    from transformers import Olmo2ForCausalLM  # at run time where a base is made or loaded: slow to import

    from dynaroute.training.loop import Batch


def new_base(settings: PretrainedBase, vocab_size: int, max_seq_len: int, eot_id: int) -> "Olmo2ForCausalLM":
    """A small OLMo-2 with random weights, to be pretrained."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return Olmo2ForCausalLM(
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


def load_base(path: str | Path, device: str, revision: str | None = None) -> "Olmo2ForCausalLM":
    """A base from a directory or the hub, for inference; no parameter takes gradients.

    Args:
        path: a `Path` is a directory that a stage wrote, and the base has the dtype that it was saved in; a string may
            be a hub id as well, and the base is fp32.
        device: cpu or cuda.
        revision: a commit on the hub.

    Raises:
        DynarouteError: there is no such directory, or what `load_model` raises.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(path, Path):
        if not (path / "config.json").is_file():
            raise DynarouteError(f"{path}: no base model: run the stage prepare_base")
        return load_model(str(path), AutoModelForCausalLM, path, device, "auto")
    return load_model(str(path), AutoModelForCausalLM, path, device, torch.float32, revision)


class LanguageModelObjective:
    """Next-token NLL of a transformers language model, in nats per token."""

    def loss(self, model: nn.Module, batch: "Batch", step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean NLL of a batch."""
        nll = F.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())
        return nll, {"loss": nll}

    def validation_sums(self, model: nn.Module, batch: "Batch", step: int) -> dict[str, Tensor]:
        """NLL and predicted tokens, summed."""
        logits = model(batch.tokens).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return {"nll": nll.double().sum(), "predicted": (batch.targets != IGNORED_TARGET).sum()}

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean NLL."""
        return {"loss": float(sums["nll"] / sums["predicted"])}
