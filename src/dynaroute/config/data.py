"""Settings of text and tokens: corpora, their sources, splits and tokenizers, and what the hub has under an id."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from dynaroute.config.schema import Distinct, Fraction, NonNegative, Positive, Section, chosen_by_kind, invalid
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.scratch import hint_of_copy


class Hosted(Section):
    """What the hub has under an id, or a local directory holds."""

    path: Annotated[str, Field(min_length=1)]
    revision: str | None  # a commit hash, so that nothing can change under a finished run; null for a local directory

    @model_validator(mode="after")
    def _a_local_directory_has_no_revisions(self) -> Self:
        if self.revision is not None and Path(self.path).is_dir():
            raise invalid("revision", self.revision, f"must be null, since path = {self.path!r} is a local directory")
        return self

    def refuse_unpinned(self, key: str) -> None:
        """Raises DynarouteError if this is no folder here and has no revision; `key` is what the line begins with."""
        if self.revision is not None or Path(self.path).is_dir():
            return
        if (hint := hint_of_copy(self.path)) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path):
            raise DynarouteError(f"{key}.path = {self.path!r}: no such folder (seen from {Path.cwd()}){hint}")
        kind = "datasets/" if isinstance(self, HostedData) else ""
        raise DynarouteError(
            f"{key}.revision = None: {self.path!r} is no folder here, and of the hub a commit must be named: "
            f"`git ls-remote https://huggingface.co/{kind}{self.path} HEAD` prints the newest"
        )


class HostedData(Hosted):
    """A dataset among what is hosted; the rest are models and their tokenizers."""


class Domain(Section):
    """Files of installed packages with text of one kind."""

    read: Literal["text", "docstrings"]  # files whole, or the docstrings of Python files without their examples
    paths: Annotated[list[str], Field(min_length=1), Distinct]  # patterns that start with a package: numpy/**/*.csv


class InstalledText(Section):
    """Text of several kinds that installed packages bring: a corpus without a network. `source` is the domain."""

    kind: Literal["installed_text"]
    characters: Positive  # of each domain, or all there are
    domains: Annotated[dict[str, Domain], Field(min_length=1)]

    @property
    def packages(self) -> list[str]:
        """The importable names of the packages that it is read from, sorted."""
        return sorted({path.partition("/")[0] for domain in self.domains.values() for path in domain.paths})


class Hub(HostedData):
    """A text dataset that `datasets.load_dataset` finds: a hub id or a local directory."""

    kind: Literal["hub"]
    name: str | None  # the dataset's configuration
    text_column: str
    rows: Literal["documents", "joined"]  # joined: all rows of a split, two newlines between, are one document


class Dolma(Section):
    """JSON lines in Dolma's format, {id, text, source, ...}, compressed by gzip or zstd, found by local glob patterns.

    Of documents with the same id and source the first is kept, and the number of the others reported. Blank lines are
    skipped. A damaged line, or one whose text is null, stops the stage: it is named, never left out.
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
    """Local UTF-8 text files found by glob patterns, a document each; `source` is the name of its folder.

    A document's id, by which it is split, is its path from the working directory; or, where an absolute pattern found
    it, from the last folder before the first wildcard, so that it does not matter where that folder lies.
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
    """Documents held out by their place in the corpus: `skip` for training, then these, then the rest for training.

    They are the same ones however many documents follow, so that a longer corpus never trains on what
    a shorter one held out.
    """

    skip: NonNegative  # documents before the region
    validation: NonNegative  # documents
    test: NonNegative  # documents, after those for validation


# official: the train, validation and test splits of a hub dataset. Told apart by type and key, so that a mistake in
# the shares is reported as such.
def _official_or_a_mapping(data: Any) -> Any:
    if data != "official" and not isinstance(data, dict | Split | Region):
        raise PydanticCustomError("not_a_split", "must be official, or a mapping with the keys validation, test")
    return data


def _kind_of_split(value: Any) -> str:
    if isinstance(value, str):
        return "official"
    return "region" if isinstance(value, Region) or (isinstance(value, dict) and "skip" in value) else "shares"


HeldOut = Annotated[
    Annotated[Literal["official"], Tag("official")]
    | Annotated[Split, Tag("shares")]
    | Annotated[Region, Tag("region")],
    Discriminator(_kind_of_split),
    BeforeValidator(_official_or_a_mapping),
]


class ByteBPE(Section):
    """A byte-level BPE trained on the corpus's own training split."""

    kind: Literal["bpe"]
    vocab_size: Annotated[int, Field(ge=257, le=2**20)]  # 256 bytes and the end-of-text token


class GPT2(Section):
    """GPT-2's BPE by tiktoken: 50,257 tokens."""

    kind: Literal["gpt2"]


class HubTokenizer(Hosted):
    """The fast tokenizer of a hub id or a local directory.

    One that splits text first, as GPT-2's, Llama 3's, OLMo 2's or Qwen's do, reads documents of any length in pieces.
    Any other, such as Llama 2's, reads them whole, up to four million characters.
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
