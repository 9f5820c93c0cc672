"""Models and tokenizers loaded by transformers: safetensors or GGUF only, without remote code."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dynaroute.data.tokens.tokenizers import pretrained
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.machine import require_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # at run time where they are loaded: slow


def load_model(
    name: str,
    kind: Literal["AutoModel", "AutoModelForCausalLM"],
    path: str | Path,
    device: str,
    dtype: torch.dtype | Literal["auto"],
    revision: str | None = None,
) -> "PreTrainedModel":
    """A model for inference whose files hold all of its weights.

    Args:
        name: what errors call it.
        kind: without or with the language model head.
        path: a hub id, a folder or a GGUF file.
        device: cpu or cuda.
        dtype: of its weights and its computation; auto: the one it was saved in.
        revision: a commit on the hub.

    Raises:
        DynarouteError: the device is not there, the model cannot be loaded, or its files lack tensors.
    """
    import transformers
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    require_device(device)
    model, info = _load(
        name,
        getattr(transformers, kind),
        path,
        revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    # transformers draws missing weights at random. A pooler's output is not used here.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise DynarouteError(f"{name}: its files lack {len(missing)} of the model's tensors, such as {missing[0]}")
    return model.requires_grad_(False).eval().to(device)


def load_tokenizer(name: str, path: str | Path, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """A tokenizer.

    Raises:
        DynarouteError: it cannot be loaded; the error begins with `name`.
    """
    from transformers import AutoTokenizer

    return _load(name, AutoTokenizer, path, revision, trust_remote_code=False)


def _load(name: str, cls: Any, path: str | Path, revision: str | None, **options: Any) -> Any:
    try:
        return cls.from_pretrained(**pretrained(path, revision), **options)
    except Exception as error:  # missing or damaged files raise a dozen types without a common base class
        reason = str(error).strip().partition("\n")[0]
        raise DynarouteError(f"{name}: cannot be loaded: {reason}") from error
