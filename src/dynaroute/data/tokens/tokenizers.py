"""Text to tokens and back: GPT-2 by tiktoken, all others by the `tokenizers` library.

A tokenizer is made once (`save_tokenizer`), kept in a folder beside its tokens, and loaded from there without a network
or `transformers`. All of them read special tokens in a document as ordinary text, so the end-of-text token only ever
marks the end of a document.
"""

import base64
import functools
import importlib.util
import itertools
import os
import re
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dynaroute.config.data import GPT2, ByteBPE, HubTokenizer
from dynaroute.data.tokens.cuts import GPT2_CUTS, cuts_of
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json, write_text

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pre-tokenizer; possessive quantifiers make it faster and match the same.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_FILE = "gpt2.tiktoken"  # tiktoken's format: a line "base64 of the token's bytes, its id" for each token


def available_cores() -> int:
    """The cores that this process may use; a batch system can allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tokenizer(Protocol):
    """The interface of all tokenizers, whichever library does the work."""

    ids: np.ndarray  # int64, ascending ids that have a token; there may be gaps
    vocab_size: int  # the largest id + 1
    eot_id: int  # the end-of-text token
    cuts: re.Pattern[str] | None  # where a text can be cut, see `cuts_of`

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, uint32, encoded on all cores; no special tokens are added. Threads may call it."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""


class TiktokenTokenizer:
    """GPT-2's tokenizer from the token file in a folder; `encoding` is tiktoken's own."""

    cuts = GPT2_CUTS

    def __init__(self, folder: Path) -> None:
        """Reads the token file; raises DynarouteError if it is missing or damaged."""
        path = folder / GPT2_FILE
        try:
            pairs = [line.split() for line in path.read_bytes().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            arguments = {"mergeable_ranks": ranks, "special_tokens": {END_OF_TEXT: len(ranks)}}
            self._make = functools.partial(tiktoken.Encoding, "gpt2", pat_str=GPT2_PATTERN, **arguments)
            self.encoding = self._make()
        except (OSError, ValueError) as error:
            raise DynarouteError(f"{path}: not a readable token file: {error}: tokenize the corpus again") from error
        self.ids = np.array(sorted([*ranks.values(), self.encoding.eot_token]))
        self.vocab_size = self.encoding.n_vocab
        self.eot_id = self.encoding.eot_token
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(available_cores(), initializer=self._start_thread)

    def _start_thread(self) -> None:
        # 25 ms and 10 MB. Threads that share an encoding contend for its regular expression's working memory at every
        # match, which costs up to half of their speed.
        self._own.encoding = self._make()

    def _encode(self, text: str) -> np.ndarray:
        # `encode_ordinary_batch` makes a Python list of ids, for which all threads have to wait.
        encode = functools.partial(self._own.encoding.encode_to_numpy, disallowed_special=())
        try:
            return encode(text)
        except ValueError:  # the pattern fails on a million white spaces in a row that do not end the text
            starts = [match.start() for match in GPT2_CUTS.finditer(text)]
            edges = itertools.pairwise([0, *starts, len(text)])
            return np.concatenate([encode(text[start:stop]) for start, stop in edges])

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return list(self._threads.map(self._encode, texts))

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer`."""
        return self.encoding.decode(ids)


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library from tokenizer.json and tokenizer_config.json in a folder.

    `tokenizer` is the library's own.
    """

    def __init__(self, folder: Path) -> None:
        """Reads both files; raises DynarouteError if one is missing or damaged, or names no end-of-text token."""
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise DynarouteError(f"{path}: not a readable tokenizer: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # as ordinary text; the file does not keep this setting
        self.ids = np.array(sorted(self.tokenizer.get_vocab().values()))
        self.vocab_size = int(self.ids[-1]) + 1
        eos = read_record(folder / "tokenizer_config.json").get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        eot_id = self.tokenizer.token_to_id(eos) if isinstance(eos, str) else None
        if eot_id is None:
            raise DynarouteError(f"{folder / 'tokenizer_config.json'}: eos_token = {eos!r}: must be a token")
        self.eot_id = eot_id
        self.cuts = cuts_of(self.tokenizer)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer`."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def save_tokenizer(
    settings: ByteBPE | GPT2 | HubTokenizer, training_texts: Iterable[str], folder: str | Path
) -> Tokenizer:
    """Makes the tokenizer of a corpus and saves it into a new folder.

    Only a byte-level BPE reads the training texts, which may be pieces of longer ones, cut at GPT2_CUTS. The files
    depend on settings and texts alone, not on the number of threads. `AutoTokenizer.from_pretrained` loads the folder
    too, except GPT-2's.

    Raises:
        DynarouteError: the texts are too few for the vocabulary, or a tokenizer cannot be fetched or used.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    match settings:
        case ByteBPE():
            _train_bpe(settings.vocab_size, training_texts, folder)
        case GPT2():
            _save_gpt2(folder)
        case HubTokenizer():
            _save_hub_tokenizer(settings, folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads a tokenizer that `save_tokenizer` saved. Raises DynarouteError if a file is missing or damaged."""
    folder = Path(folder)
    return TiktokenTokenizer(folder) if (folder / GPT2_FILE).exists() else HuggingFaceTokenizer(folder)


def _train_bpe(vocab_size: int, texts: Iterable[str], folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = tokenizer.get_vocab_size()
    if learned < vocab_size:
        raise DynarouteError(f"tokenizer.vocab_size = {vocab_size}: the training text yields only {learned} tokens")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_json(folder / "tokenizer_config.json", config)


def _save_gpt2(folder: Path) -> None:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # what `requests` raises is an OSError too
        raise DynarouteError(
            "tokenizer.kind = 'gpt2': tiktoken cannot fetch its files "
            f"(without a network, point TIKTOKEN_CACHE_DIR to a folder that has them): {error}"
        ) from error
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    write_text(folder / GPT2_FILE, "".join(lines))


def pretrained(path: str | Path, revision: str | None) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a hub id, a folder or a GGUF file."""
    if not str(path).endswith(".gguf"):
        return {"pretrained_model_name_or_path": path, "revision": revision or "main"}
    if importlib.util.find_spec("gguf") is None:
        raise DynarouteError(f"{path}: reading it needs a package: run `pip install --constraint constraints.txt gguf`")
    return {"pretrained_model_name_or_path": Path(path).parent, "gguf_file": Path(path).name}


def _save_hub_tokenizer(settings: HubTokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer  # takes seconds to import

    name = settings.path + (f" at {settings.revision}" if settings.revision else "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **pretrained(settings.place, settings.revision), trust_remote_code=False
        )
    except Exception as error:  # a folder with other content can raise anything
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise DynarouteError(f"tokenizer.path: {name} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise DynarouteError(f"tokenizer.path: {name} has no fast tokenizer (tokenizer.json), which is needed")
    if tokenizer.eos_token is None:
        raise DynarouteError(f"tokenizer.path: {name} has no end-of-text token (eos_token), which is needed")
    tokenizer.save_pretrained(folder)
