"""The frozen language model that a DAGFormer wires: a small one pretrained here, or one that exists.

Whatever it came from, it is kept as an ordinary transformers directory, and everything loads it from there.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaroute.config import LoadedBase, PretrainedBase
from dynaroute.errors import DynarouteError
from dynaroute.training.loop import Batch

if TYPE_CHECKING:
    from transformers import Olmo2ForCausalLM  # at run time where a base is made or loaded: slow to import


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
    """A base from a directory or the hub, for inference: fp32 on a CPU, bf16 on a GPU; no parameter takes gradients.

    Raises:
        DynarouteError: it cannot be loaded, or is not a causal language model in safetensors files.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision or "main",
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DynarouteError(f"{path}: not a loadable language model: {reason}") from error
    return model.requires_grad_(False).eval().to(device)


def load_base_tokenizer(settings: LoadedBase, folder: Path) -> None:
    """Saves the tokenizer of a base that exists beside it.

    Raises:
        DynarouteError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.path, revision=settings.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DynarouteError(f"dagformer.base.path: {settings.path}: no loadable tokenizer: {reason}") from error
    tokenizer.save_pretrained(folder)


class LanguageModelObjective:
    """Next-token NLL of a transformers language model, in nats per token."""

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean NLL of a batch."""
        nll = F.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())
        return nll, {"loss": nll}

    def validation_sums(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """NLL and predicted tokens, summed."""
        logits = model(batch.tokens).logits
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return {"nll": nll.double().sum(), "predicted": (batch.targets != -100).sum()}

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean NLL."""
        return {"loss": float(sums["nll"] / sums["predicted"])}
