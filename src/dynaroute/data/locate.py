"""What the settings name outside of the repository, as it is right now: packages, text, tokenizers, bases, encoders.

Stages depend on it by files that `stages/data/locate.py` writes on every run.
"""

import json
from pathlib import Path
from typing import Any

from dynaroute.config import Settings
from dynaroute.config.data import Dolma, DolmaStream, Files, Hosted, HostedData, HubTokenizer, InstalledText
from dynaroute.config.schema import Section
from dynaroute.data.text import installed
from dynaroute.data.text.sources import dataset_files, matched_files
from dynaroute.pipeline.hashes import hash_files

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}  # which no tokenizer reads


def locate(section: Section, key: str) -> dict[str, Any]:
    """The packages with their versions, or the files with their hashes, that a section of the settings names.

    Two results that are equal mean the same text, tokenizer or weights. A section that names nothing has no files.

    Raises:
        DynarouteError: a package is not installed, a pattern matches no file, or there is neither a folder nor a
            revision. `key` is the section's place in params.yaml.
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
    """The files of a local folder that are read of it, by their place in it; none of what the hub holds."""
    folder = Path(section.path)
    if isinstance(section, DolmaStream):
        found = [folder / section.addresses]
    elif isinstance(section, HostedData):
        found = dataset_files(folder)
    else:  # a model's folder may hold checkpoints of its training, in folders that nothing reads
        found = [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]
        found += [folder / name for index in folder.glob("*.index.json") for name in _shards(index)]
    if isinstance(section, HubTokenizer):
        found = [path for path in found if path.suffix not in WEIGHTS]
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def _shards(index: Path) -> list[str]:
    """The files that the index of a checkpoint names, which may lie in folders below; none if it cannot be read."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):  # whoever loads the model says so
        return []


def sections(settings: Settings, corpus: str) -> dict[str, Section]:
    """What may name something outside of the repository for a corpus, and for DAGFormer if it is trained on that."""
    own, dagformer = settings.corpus(corpus), settings.dagformer
    found = {f"corpora.{corpus}.source": own.source, f"corpora.{corpus}.tokenizer": own.tokenizer}
    if corpus == dagformer.corpus:
        found |= {"dagformer.base": dagformer.base, "dagformer.encoder": dagformer.encoder}
    return found
