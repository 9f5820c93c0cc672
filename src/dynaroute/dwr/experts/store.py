"""The expert store: a model on disk as one file for its backbone and one for each expert.

    manifest.json                        run, config, how often each expert is used, size and SHA-256 of every file
    backbone.safetensors                 everything but the experts
    expert_layer{L}_id{E}.safetensors    w1, w2, b1, b2 of one expert

Every file is a valid safetensors file, written by hand for the layout: the header is padded so that the data starts on
a page, and an expert's tensors lie adjacent at multiples of 64 bytes. One aligned map, or read, is then the expert, and
its kernels give the same bits as with weights in memory: a matrix product on misaligned weights may not.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dynaroute.artifacts import output_directory, read_json, sha256, write_json
from dynaroute.config import Positive, Section, invalid
from dynaroute.dwr.model import DWRConfig, DWRTransformer, ExpertWeights
from dynaroute.errors import DynarouteError
from dynaroute.training.checkpoints import load_checkpoint

PAGE = 4096  # bytes
FLOAT = 4  # bytes of a float32
BACKBONE = "backbone.safetensors"
MANIFEST = "manifest.json"
REMEDY = "run stages/export_experts.py again"


class TensorEntry(Section):
    """One tensor of a file, as safetensors names its type."""

    shape: list[Positive]
    dtype: Literal["F32"]


class FileEntry(Section):
    """What a file must be."""

    bytes: Positive
    sha256: str
    tensors: dict[str, TensorEntry]


class Manifest(Section):
    """Content of manifest.json."""

    format: Literal[1]
    run: Annotated[str, Field(max_length=64)]  # of the training; short, so that an expert's header fits in one page
    config: DWRConfig
    expert_load: list[
        list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    ]  # [L][E], an expert's share of its layer's assignments on the validation split
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _describes_its_model(self) -> Self:
        config, widths = self.config, [len(layer) for layer in self.expert_load]
        if len(widths) != config.num_layers or set(widths) != {config.num_experts}:
            raise invalid("expert_load", widths, f"must be {config.num_layers} layers of {config.num_experts} experts")
        expected = {name: _entries(shapes) for name, (shapes, _) in file_contents(config, self.run).items()}
        if {name: entry.tensors for name, entry in self.files.items()} != expected:
            raise invalid("files", sorted(self.files), "names and tensors must be those of the config's model")
        return self


class _SkipInit(TorchFunctionMode):
    """Leaves new parameters as they are. Initialising them on the meta device imports the compiler: over a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def model_without_weights(config: DWRConfig) -> DWRTransformer:
    """The modules alone: parameters on the meta device have shapes and no memory."""
    with torch.device("meta"), _SkipInit():
        return DWRTransformer(config)


def expert_file(layer: int, expert: int) -> str:
    """The name of an expert's file."""
    return f"expert_layer{layer}_id{expert}.safetensors"


def export_store(model: DWRTransformer, run: str, expert_load: list[list[float]], path: str | Path) -> None:
    """Writes a model with resident float32 experts as a store; an older store is replaced as a whole.

    Args:
        model: the trained model.
        run: identifies the training that made it; every file carries it.
        expert_load: [L][E], how often each expert is used; the cache's warm start reads it.
        path: the folder to write.
    """
    tensors, files = model.state_dict(), {}
    with output_directory(path) as folder:
        for name, (shapes, state) in file_contents(model.config, run).items():
            prefix = "" if name == BACKBONE else f"layers.{state['layer']}.moe.experts.{state['expert']}."
            with (folder / name).open("wb") as file:
                file.write(safetensors_header(shapes, state))
                for tensor in shapes:
                    file.write(_little_endian(tensors[prefix + tensor]))
                size = file.tell()
            files[name] = FileEntry(bytes=size, sha256=sha256(folder / name), tensors=_entries(shapes))
        manifest = Manifest(format=1, run=run, config=model.config, expert_load=expert_load, files=files)
        write_json(folder / MANIFEST, manifest.model_dump())


class ExpertStore:
    """Reads a store. Opening it checks everything but the weights themselves; `verify` checks those too.

    Attributes:
        run: the training that the weights are from.
        config: sizes of the model.
        expert_load: [L][E], an expert's share of its layer's assignments on the validation split.
        num_experts: in all layers together.
        expert_bytes: weights of one expert.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the store in a folder.

        Raises:
            DynarouteError: the manifest is damaged; or a file is missing, has another size or other tensors than the
                manifest says, or belongs to another run.
        """
        self.path = Path(path)
        self._manifest = _read_manifest(self.path / MANIFEST)
        self.run, self.config = self._manifest.run, self._manifest.config
        self.expert_load = self._manifest.expert_load
        self.num_experts = self.config.num_layers * self.config.num_experts
        self.expert_bytes = FLOAT * self.config.num_params_per_expert()
        # File names come from the config, never from the manifest, so nothing outside of the folder is ever opened.
        for name, (shapes, state) in file_contents(self.config, self.run).items():
            _check_file(self.path / name, self._manifest.files[name].bytes, shapes, state)

    def verify(self) -> None:
        """Reads every file and compares its SHA-256.

        Raises:
            DynarouteError: naming the first file that has changed.
        """
        for name, entry in self._manifest.files.items():
            try:
                found = sha256(self.path / name)
            except OSError as error:
                raise DynarouteError(f"{self.path / name}: cannot be read: {error.strerror}: {REMEDY}") from error
            if found != entry.sha256:
                raise DynarouteError(f"{self.path / name}: SHA-256 is {found}, not {entry.sha256}: {REMEDY}")

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """One expert as views of one memory map of its file: pages come from disk when they are first touched.

        The map goes when the last of the tensors does; the system's page cache may keep the file's pages after that.

        Raises:
            DynarouteError: the file has gone or was truncated since the store was opened.
        """
        path = self.path / expert_file(layer, expert)
        d, f = self.config.d_model, self.config.d_ff
        sizes = [PAGE // FLOAT, d * f, f * d, f, d]  # the header first
        try:
            # It keeps no file descriptor open, unlike mmap.mmap: any number of experts can be mapped.
            floats = torch.from_file(str(path), shared=False, size=sum(sizes), dtype=torch.float32)
        except RuntimeError as error:
            raise DynarouteError(f"{path}: cannot be mapped: {str(error).splitlines()[0]}: {REMEDY}") from error
        _, w1, w2, b1, b2 = floats.split(sizes)
        return ExpertWeights(w1.view(d, f), b1, w2.view(f, d), b2)

    def read_backbone(self) -> dict[str, Tensor]:
        """Everything but the experts, by its name in the model, copied into memory."""
        tensors, _ = load_checkpoint(self.path / BACKBONE)
        return {name: tensor.clone() for name, tensor in tensors.items()}  # what was loaded is a map of the file


def file_contents(config: DWRConfig, run: str) -> dict[str, tuple[dict[str, list[int]], dict[str, Any]]]:
    """For every file: the shapes of its tensors in the order in which they are stored, and the state in its header."""
    tensors = model_without_weights(config).state_dict()
    backbone = {name: list(tensor.shape) for name, tensor in tensors.items() if ".moe.experts." not in name}
    d, f = config.d_model, config.d_ff
    expert = {"w1": [d, f], "w2": [f, d], "b1": [f], "b2": [d]}
    contents: dict[str, tuple[dict[str, list[int]], dict[str, Any]]] = {
        BACKBONE: (backbone, {"run": run, "config": config.model_dump()})
    }
    for layer in range(config.num_layers):
        for index in range(config.num_experts):
            contents[expert_file(layer, index)] = expert, {"run": run, "layer": layer, "expert": index}
    return contents


def _entries(shapes: dict[str, list[int]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(shape=shape, dtype="F32") for name, shape in shapes.items()}


def safetensors_header(shapes: dict[str, list[int]], state: dict[str, Any]) -> bytes:
    """What precedes the data of a safetensors file: the length of a JSON text, and that text, padded with spaces.

    The state is under one key, as in our checkpoints, which makes each file of a store readable as one of those.
    """
    entries: dict[str, Any] = {"__metadata__": {"state": json.dumps(state)}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + FLOAT * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _little_endian(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.float32:
        raise ValueError(f"the store holds float32, not {tensor.dtype}")
    return tensor.cpu().numpy().astype("<f4", copy=False).tobytes()


def _read_manifest(path: Path) -> Manifest:
    data = read_json(path)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = [*map(str, first["loc"]), *([first["ctx"]["key"]] if first["type"] == "invalid" else [])]
        where = ".".join(place) or "the whole"
        raise DynarouteError(f"{path}: {where}: {first['msg']}: {REMEDY}") from error


def _check_file(path: Path, size: int, shapes: dict[str, list[int]], state: dict[str, Any]) -> None:
    """Checks a file's size and header, which is known to the byte."""
    expected = safetensors_header(shapes, state)
    try:
        with path.open("rb") as file:
            found, found_size = file.read(len(expected)), path.stat().st_size
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: {REMEDY}") from error
    if found != expected:
        raise DynarouteError(f"{path}: {_difference(found, expected)}: {REMEDY}")
    data_size = FLOAT * sum(map(math.prod, shapes.values()))
    if not found_size == size == len(expected) + data_size:
        needed = len(expected) + data_size
        raise DynarouteError(f"{path}: has {found_size} bytes, the manifest says {size}, it needs {needed}: {REMEDY}")


def _difference(found: bytes, expected: bytes) -> str:
    """In words, the first difference between two headers."""
    try:
        ours, theirs = (json.loads(text[8:]) for text in (expected, found))
        expected_state, state = (json.loads(entries.pop("__metadata__")["state"]) for entries in (ours, theirs))
        for key in expected_state:
            if state[key] != expected_state[key]:
                return f"belongs to {key} {state[key]}, not {expected_state[key]}"
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                return f"tensor {name} is {theirs.get(name)}, not {ours.get(name)}"
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return "its header is not the one that was exported"
