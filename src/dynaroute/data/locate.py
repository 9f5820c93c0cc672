"""The current state of what the settings name outside the repository: packages, text, tokenizers, bases, encoders.

`stages/data/locate.py` writes it to files on every run, and stages depend on those files.
"""

import json
from pathlib import Path
from typing import Any

from dynaroute.config import Settings
from dynaroute.config.data import Dolma, DolmaStream, Files, Hosted, HostedData, HubTokenizer, InstalledText
from dynaroute.config.schema import Section
from dynaroute.data.text import installed
from dynaroute.data.text.sources import matched_files
from dynaroute.pipeline.hashes import hash_files

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}  # which no tokenizer reads


def locate(section: Section, key: str) -> dict[str, Any]:
    """The packages with versions, or the files with hashes, that a section names; `key` is its place in params.yaml.

    Equal results mean the same text, tokenizer or weights. A section that names nothing has no files.

    Raises:
        DynarouteError: a package is not installed, a pattern matches no file, or there is neither a folder nor a
            revision.
    """
    match section:
        case InstalledText():
            return {"packages": {name: installed.version(name) for name in section.packages}}
        case Dolma() | Files():
            return {"files": hash_files({name: path for path, name in matched_files(section.paths).items()})}
        case Hosted():
            section.refuse_unpinned(key)
            named = section.model_dump(include={"path", "name", "revision"})
            return named | {"files": hash_files(_files_of(section))}
    return {"files": {}}


def _files_of(section: Hosted) -> dict[str, Path]:
    """The files that are read from a local folder, by their path in it; none for an id of the hub."""
    folder = Path(section.place)
    if section.is_gguf:  # a tokenizer's too
        return {folder.name: folder}
    if isinstance(section, DolmaStream):
        found = [folder / section.addresses]
    elif isinstance(section, HostedData):
        found = [path for path in sorted(folder.rglob("*")) if "/." not in f"/{path.relative_to(folder)}"]
    else:  # a model's folder may hold training checkpoints in subfolders, which nothing reads
        found = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
        found += [folder / name for index in folder.glob("*.index.json") for name in _shards(index)]
    if isinstance(section, HubTokenizer):
        found = [path for path in found if path.suffix not in WEIGHTS]
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def _shards(index: Path) -> list[str]:
    """The files that a checkpoint's index names, possibly in subfolders; none if it cannot be read."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):  # loading the model reports it
        return []


def sections(settings: Settings, corpus: str) -> dict[str, Section]:
    """The sections that may name something outside the repository: a corpus's, and DAGFormer's if it trains on it."""
    own, dagformer = settings.corpus(corpus), settings.dagformer
    found = {f"corpora.{corpus}.source": own.source, f"corpora.{corpus}.tokenizer": own.tokenizer}
    if corpus == dagformer.corpus:
        found |= {"dagformer.base": dagformer.base, "dagformer.encoder": dagformer.encoder}
    return found
