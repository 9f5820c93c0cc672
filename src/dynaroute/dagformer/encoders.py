"""Frozen encoders, which turn windows of tokens into the vectors that predictors read: once, for all variants.

A folder of embeddings holds a file for each split in it, such as `test.npy`, float32 [windows, E]; where the prefix
protocol needs it `test_prefix.npy`, of the same windows but from their first tokens only; and metadata.json.

    B batch   t tokens read of a window   E embedding
"""

from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.config import BaseEncoder, HubEncoder
from dynaroute.dagformer.decoder import Decoder, load_base
from dynaroute.dagformer.hub import load_model, load_tokenizer
from dynaroute.data.tokens.tokenizers import Tokenizer
from dynaroute.data.tokens.windows import Selection
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import move_directory, read_record, sha256, write_json
from dynaroute.pipeline.scratch import discard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH_TOKENS = 8192
NOTE_WINDOWS = 2**14  # between two notes of how far a run is: what a kill can cost, minutes on a GPU


class Encoder(Protocol):
    """What both encoders offer."""

    embedding_size: int  # E
    dtype: torch.dtype  # of its weights, and what it computes in

    def encode(self, tokens: Tensor) -> Tensor:
        """The vectors of windows, [B, E] float32 on the CPU, from their tokens, [B, t] int64."""


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


class TextEncoder:
    """A text encoder, whose own tokenizer reads the text of a window: its last hidden states, averaged over its tokens.

    The tokenizer adds the special tokens that the encoder knows, and reads those in the text as such.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", corpus: Tokenizer, name: str
    ) -> None:
        """Takes a frozen encoder and the corpus's tokenizer; `name` is what errors call the encoder.

        Raises:
            DynarouteError: the encoder's tokenizer has nothing to pad with.
        """
        if tokenizer.pad_token is None:  # any token will do: the mask tells padding by place
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise DynarouteError(f"{name}: its tokenizer has neither pad_token nor eos_token, and one is needed")
        tokenizer.padding_side = "right"  # positions count from 0 in every text, whatever it is padded to
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
            DynarouteError: a text has more tokens than the encoder can read, or none.
        """
        inputs = self.tokenizer(texts, padding=True, return_attention_mask=True, return_tensors="pt")
        mask = inputs["attention_mask"]  # [B, s]: 1 at a text's own tokens, 0 at padding
        lengths = mask.sum(1)
        if lengths.min() == 0:
            raise DynarouteError(f"{self.name}: its tokenizer finds no token in {texts[int(lengths.argmin())]!r}")
        if lengths.max() > self.max_tokens:
            raise DynarouteError(
                f"{self.name}: reads at most {self.max_tokens} tokens, but a window has {int(lengths.max())} of them: "
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
        base: the base's directory; for the encoder of kind base.
        corpus: the tokenizer of the windows; for the encoder of kind hub.
        device: cpu or cuda.
        dtype: of the weights; for the encoder of kind hub. The base has the one that it was saved in.

    Raises:
        DynarouteError: the device is not there, or the encoder cannot be loaded, or its files lack weights.
    """
    if isinstance(settings, BaseEncoder):
        return BaseStates(load_base(base, device))
    name = f"dagformer.encoder.path: {settings.path}" + (f" at {settings.revision}" if settings.revision else "")
    model = load_model(name, "AutoModel", settings.path, device, dtype, settings.revision)
    return TextEncoder(model, load_tokenizer(name, settings.path, settings.revision), corpus, name)


def write_embeddings(
    encoder: Encoder,
    identity: dict[str, Any],
    windows: dict[str, Selection],
    prefix_tokens: int | None,
    directory: str | Path,
    scratch: str | Path,
) -> None:
    """Encodes the windows of splits into a folder of embeddings, atomically.

    A run that was stopped goes on from its last note.

    Args:
        encoder: the loaded encoder.
        identity: everything that the vectors depend on, for metadata.json.
        windows: by split.
        prefix_tokens: what the encoder reads of a window for the `_prefix` files; None: there are none.
        directory: the folder, which is replaced.
        scratch: where the run lives until then; its own while it runs, and gone after it.

    Raises:
        DynarouteError: the encoder cannot read a window, or gives a number that is not finite.
    """
    scratch = Path(scratch)
    folder, note = scratch / "embeddings", scratch / "progress.json"
    # By file, how many of its windows are on disk.
    done: dict[str, int] = read_record(note)["windows"] if note.exists() and folder.is_dir() else {}
    folder.mkdir(exist_ok=True)
    parts = {split: (own, own.seq_len) for split, own in windows.items()}
    if prefix_tokens is not None:
        parts |= {f"{split}_prefix": (own, prefix_tokens) for split, own in windows.items()}
    total, files = sum(len(own) for own, _ in parts.values()), {}
    # A progress bar is shown on a terminal only.
    with tqdm(total=total, initial=sum(done.values()), desc="encode", unit="win", disable=None) as progress:
        for name, (own, tokens_read) in parts.items():
            path = folder / f"{name}.npy"
            for on_disk in _write_vectors(path, encoder, own, tokens_read, done.get(name, 0), progress):
                done[name] = on_disk
                write_json(note, {"windows": done})
            files[name] = {
                "file": path.name, "windows": len(own), "tokens_read": tokens_read, "sha256": sha256(path),
            }  # fmt: skip
    metadata = identity | {"embedding_size": encoder.embedding_size, "files": files}
    write_json(folder / "metadata.json", metadata)
    move_directory(folder, directory)
    discard(scratch)


def _write_vectors(
    path: Path, encoder: Encoder, windows: Selection, tokens_read: int, done: int, progress: tqdm
) -> Iterator[int]:
    """Writes the vectors of the windows from number `done` on; yields now and then how many are on disk."""
    shape = len(windows), encoder.embedding_size
    # A memory map: millions of windows need not fit into memory.
    vectors = _reopen(path, shape) if done else np.lib.format.open_memmap(path, "w+", "<f4", shape)
    size = max(1, BATCH_TOKENS // tokens_read)
    flushed = done
    for start in range(done, len(windows), size):
        indices = range(start, min(start + size, len(windows)))
        tokens, _ = windows.batch(indices)
        encoded = encoder.encode(tokens[:, :tokens_read]).numpy()  # [B, E]
        if not np.isfinite(encoded).all():
            raise DynarouteError(f"the encoder gives numbers that are not finite for windows {start} to {indices[-1]}")
        vectors[start : indices[-1] + 1] = encoded
        progress.update(len(indices))
        if indices[-1] + 1 >= min(flushed + NOTE_WINDOWS, len(windows)):
            vectors.flush()
            flushed = indices[-1] + 1
            yield flushed


def _reopen(path: Path, shape: tuple[int, int]) -> np.memmap:
    try:
        vectors = np.lib.format.open_memmap(path, "r+")
        if vectors.dtype == "<f4" and vectors.shape == shape:
            return vectors
        found = f"{vectors.dtype} {vectors.shape}"
    except (OSError, ValueError, TokenError) as error:
        found = error
    raise DynarouteError(f"{path}: damaged: {found}: remove {path.parents[1]} to begin anew")


def load_embeddings(directory: str | Path) -> dict[str, np.ndarray]:
    """Embeddings by the names of their files.

    Returns:
        float32 [windows, E] each, mapped copy on write: torch takes them as they are, and no file can change.

    Raises:
        DynarouteError: naming the file that is missing, damaged or not what metadata.json says.
    """
    directory = Path(directory)
    metadata = read_record(directory / "metadata.json")
    size, files = metadata["embedding_size"], metadata["files"]
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise DynarouteError(f"{directory / 'metadata.json'}: damaged: files must be a mapping of plain file names")
    return {name: _open_vectors(directory / f"{name}.npy", own["windows"], size) for name, own in files.items()}


def _open_vectors(path: Path, windows: int, size: int) -> np.ndarray:
    try:
        vectors = np.lib.format.open_memmap(path, mode="c")  # .npy alone, and never a pickle
    except (OSError, ValueError, TokenError) as error:
        raise DynarouteError(f"{path}: missing or damaged: {error}: run the stage encode_windows again") from error
    if vectors.dtype != "<f4" or vectors.shape != (windows, size):
        found = f"{vectors.dtype} {vectors.shape}"
        raise DynarouteError(f"{path}: {found}, but metadata.json says float32 {(windows, size)}")
    return vectors.view(np.ndarray)
