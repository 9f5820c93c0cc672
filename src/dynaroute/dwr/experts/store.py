"""The expert store: a model on disk, with one file for its backbone and one for each expert.

    manifest.json                        run, config, usage of experts, SHA-256 of every file
    backbone.safetensors                 everything but the experts
    expert_layer{L}_id{E}.safetensors    w1, w2, b1, b2 of one expert
    tokenizer/                           of the text that the model was trained on

Every .safetensors file is valid, and written by hand for the layout: the header is padded so that the data starts on a
page, and an expert's tensors are adjacent, at multiples of 64 bytes, in the layout in which they are multiplied. So a
map of the file can be used as the expert, and gives the same bits as weights in allocated memory: a matrix product with
misaligned weights may not.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dynaroute.config.dwr import Precision
from dynaroute.config.schema import Section, invalid
from dynaroute.dwr.experts.mapping import PAGE, Version, drop_from_page_cache, map_file
from dynaroute.dwr.experts.precision import DTYPES, TensorEntry, dequantize, quantize, stored_tensors
from dynaroute.dwr.model import DWRConfig, DWRTransformer, ExpertWeights
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory, read_record, sha256, write_json

BACKBONE = "backbone.safetensors"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
REMEDY = "run the stage export_experts again"


class FileEntry(Section):
    """Size, hash and tensors of a file."""

    bytes: Annotated[int, Field(gt=0)]
    sha256: str
    tensors: dict[str, TensorEntry]


class Usage(Section):
    """Usage of experts on the validation split."""

    load: list[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]]  # [L][E], share of the layer's assignments
    transitions: list[list[list[Annotated[int, Field(ge=0)]]]]  # [L-1][E][E], tokens that use i in l and j in l + 1

    def refuse_other_sizes(self, layers: int, experts: int) -> None:
        """Raises a validation error unless it is of a model with so many layers, and experts in each."""
        if not _is_matrix(self.load, layers, experts):
            raise invalid("usage.load", self.load, f"must be {layers} layers of {experts} experts")
        if len(self.transitions) != layers - 1 or not all(_is_matrix(m, experts, experts) for m in self.transitions):
            raise invalid("usage.transitions", "...", f"must be {layers - 1} times {experts} x {experts} experts")


class Manifest(Section):
    """Content of manifest.json."""

    # 2: a top_k of 1 weighs outputs by 1; 3: by their probability; 4: the tokenizer is hashed too.
    format: Literal[2, 3, 4]
    run: Annotated[str, Field(max_length=64)]  # of the training; short, so that an expert's header fits in one page
    config: DWRConfig
    precision: Precision  # of the experts' weights
    usage: Usage
    files: dict[str, FileEntry]
    tokenizer: dict[str, str] | None = None  # SHA-256 of its files, by name; None before format 4

    @model_validator(mode="after")
    def _describes_its_model(self) -> Self:
        if self.format == 2 and self.config.top_k == 1:
            raise invalid("format", self.format, "must be 3 or 4 with top_k = 1, whose router could not learn before")
        if (self.tokenizer is None) != (self.format < 4):
            raise invalid(
                "tokenizer", self.tokenizer, "must be the hashes of its files from format 4 on, and only then"
            )
        self.usage.refuse_other_sizes(self.config.num_layers, self.config.num_experts)
        contents = file_contents(self.config, self.run, self.precision)
        if {name: entry.tensors for name, entry in self.files.items()} != {name: c[0] for name, c in contents.items()}:
            raise invalid("files", sorted(self.files), "names and tensors must be those of the config's model")
        return self


def _is_matrix(rows: Sequence[Sequence[float]], height: int, width: int) -> bool:
    return len(rows) == height and all(len(row) == width for row in rows)


class _SkipInit(TorchFunctionMode):
    """Skips the initialisation of parameters. On the meta device it would import the compiler: over a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def model_without_weights(config: DWRConfig) -> DWRTransformer:
    """A model with parameters on the meta device: they have shapes but no memory."""
    with torch.device("meta"), _SkipInit():
        return DWRTransformer(config)


def expert_file(layer: int, expert: int) -> str:
    """The name of an expert's file."""
    return f"expert_layer{layer}_id{expert}.safetensors"


def export_store(
    model: DWRTransformer,
    run: str,
    usage: Usage,
    path: str | Path,
    precision: Precision = "fp32",
    tokenizer: Path | None = None,
) -> None:
    """Writes a model with resident float32 experts as a store, in place of an older one.

    Args:
        model: the trained model.
        run: identifies its training; every file holds it.
        usage: usage of experts, for some policies and prefetchers.
        path: the folder to write.
        precision: of the experts' weights on disk; the rest stays float32.
        tokenizer: the folder of the model's tokenizer, to be copied.
    """
    files = {}
    with output_directory(path) as folder:
        for name, (entries, state) in file_contents(model.config, run, precision).items():
            if name == BACKBONE:
                tensors = model.state_dict()
            else:
                ((_, weights),) = model.layers[state["layer"]].moe.experts.fetch([state["expert"]])
                tensors = quantize(weights, precision)
            with (folder / name).open("wb") as file:
                file.write(safetensors_header(entries, state))
                for tensor, entry in entries.items():
                    file.write(_content(tensors[tensor], entry))
                size = file.tell()
            files[name] = FileEntry(bytes=size, sha256=sha256(folder / name), tensors=entries)
        if tokenizer:
            shutil.copytree(tokenizer, folder / TOKENIZER)
        manifest = Manifest(
            format=4,
            run=run,
            config=model.config,
            precision=precision,
            usage=usage,
            files=files,
            tokenizer=_hashes(folder / TOKENIZER),
        )
        write_json(folder / MANIFEST, manifest.model_dump())
    for name in files:  # written in small pages, to be read in huge ones
        drop_from_page_cache(Path(path) / name)


class ExpertStore:
    """Reads a store. Opening it checks everything but the weights; a file's SHA-256 is checked when it is first read.

    A file that took the place of one is checked at its next reading. A write to a file that is mapped goes unnoticed.
    Files are not kept open: a large model has more experts than a process may have descriptors.

    Attributes:
        run: the training of the weights.
        config: sizes of the model.
        precision: of the experts' weights on disk.
        usage: usage of experts on the validation split.
        num_experts: in all layers together.
        expert_bytes: weights of one expert in memory.
        file_bytes: size of one expert's file, all of which one read reads.
        in_place: whether experts are used where they are mapped; otherwise they are copied to memory.
    """

    def __init__(self, path: str | Path, drop_pages: bool = False) -> None:
        """Opens the store in a folder.

        With `drop_pages`, experts are copied to memory and their files dropped from the page cache, so that they take
        no more memory than what holds them.

        Raises:
            DynarouteError: the manifest is damaged; or a file is missing, has another size or other tensors than the
                manifest says, or belongs to another run; or the tokenizer is another one.
        """
        self.path = Path(path)
        self._manifest = manifest = _read_manifest(self.path / MANIFEST)
        self.run, self.config = manifest.run, manifest.config
        self.precision, self.usage = manifest.precision, manifest.usage
        self.num_experts = self.config.num_layers * self.config.num_experts
        self.expert_bytes = 4 * self.config.num_params_per_expert()
        self.file_bytes = manifest.files[expert_file(0, 0)].bytes
        self._drop_pages = drop_pages
        self.in_place = self.precision == "fp32" and not drop_pages
        self._checked: dict[str, Version] = {}  # by file: its version when it was hashed
        self._held: dict[tuple[int, int], Tensor] = {}  # files that `hold_in_memory` has read
        self._places = _places(stored_tensors(self.config, self.precision), self.file_bytes)
        # File names come from the config, not from the manifest, so nothing outside of the folder is ever opened.
        for name, (entries, state) in file_contents(self.config, self.run, self.precision).items():
            _check_file(self.path / name, manifest.files[name].bytes, entries, state)
        if manifest.tokenizer is not None:
            for name, _ in sorted(manifest.tokenizer.items() ^ _hashes(self.path / TOKENIZER).items()):
                raise DynarouteError(f"{self.path / TOKENIZER / name}: is not as it was exported: {REMEDY}")

    def verify(self) -> None:
        """Reads every file and compares its SHA-256.

        Raises:
            DynarouteError: naming the first file that has changed.
        """
        self._checked.clear()
        for name in self._manifest.files:
            self._map(name)

    def hold_in_memory(self) -> None:
        """Reads all experts' files into host memory, from which `map` then serves them.

        With CUDA, the memory is page-locked for copies to the GPU. It is one block: the allocator of page-locked memory
        rounds every block up to a power of two.

        Raises:
            DynarouteError: see `map`.
        """
        layers, experts = range(self.config.num_layers), range(self.config.num_experts)
        keys = [(layer, expert) for layer in layers for expert in experts]
        pinned = torch.cuda.is_available()
        memory = torch.empty(len(keys), self.file_bytes, dtype=torch.uint8, pin_memory=pinned)
        for key, place in zip(keys, memory, strict=True):
            place.copy_(self.map(*key))
        self._held = dict(zip(keys, memory, strict=True))

    def new_weights(self, device: str = "cpu") -> ExpertWeights:
        """Uninitialised float32 weights of one expert, in one block of memory, aligned as in a file."""
        memory = torch.empty(self.expert_bytes, dtype=torch.uint8, device=device)
        return ExpertWeights(**_views(memory, _places(stored_tensors(self.config, "fp32"), self.expert_bytes)))

    def map(self, layer: int, expert: int) -> Tensor:
        """An expert's file in memory, uint8 [file_bytes], without a copy; `views` gives the tensors in it.

        Thread-safe. The memory is released with the last view of it.

        Raises:
            DynarouteError: the file is missing or truncated, or is not the one that was exported.
        """
        if (layer, expert) in self._held:
            return self._held[layer, expert]
        return self._map(expert_file(layer, expert))

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """An expert's tensors, as stored, from the bytes of its file."""
        return _views(content, self._places)

    def load(self, layer: int, expert: int, memory: ExpertWeights | None) -> ExpertWeights:
        """An expert as float32, in the memory given, or where it is mapped. Thread-safe.

        Raises:
            DynarouteError: see `map`.
        """
        views = self.views(self.map(layer, expert))
        if memory is None:
            return ExpertWeights(**views)
        dequantize(views, memory)
        if self._drop_pages:
            del views
            drop_from_page_cache(self.path / expert_file(layer, expert))
        return memory

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """A copy of one expert, as float32.

        Raises:
            DynarouteError: see `map`.
        """
        return self.load(layer, expert, self.new_weights())

    def read_backbone(self) -> dict[str, Tensor]:
        """A copy of everything but the experts, by name in the model.

        Raises:
            DynarouteError: the file is not the one that was exported.
        """
        entry = self._manifest.files[BACKBONE]
        views = _views(self._map(BACKBONE), _places(entry.tensors, entry.bytes))
        return {name: tensor.clone() for name, tensor in views.items()}  # aligned, and not a map of the file

    def _map(self, name: str) -> Tensor:
        """A file, whose SHA-256 is compared with the manifest's unless this version of the file was."""
        entry = self._manifest.files[name]
        try:
            content, version = map_file(self.path / name, entry.bytes)
        except OSError as error:
            raise DynarouteError(f"{self.path / name}: cannot be read: {error.strerror}: {REMEDY}") from error
        if self._checked.get(name) != version:
            found = hashlib.sha256(content.numpy()).hexdigest()
            if found != entry.sha256:
                raise DynarouteError(f"{self.path / name}: SHA-256 is {found}, not {entry.sha256}: {REMEDY}")
            self._checked[name] = version
        return content


def file_contents(
    config: DWRConfig, run: str, precision: Precision
) -> dict[str, tuple[dict[str, TensorEntry], dict[str, Any]]]:
    """For every file: its tensors in stored order, and the state in its header."""
    tensors = model_without_weights(config).state_dict()
    backbone = {
        name: TensorEntry(shape=list(tensor.shape), dtype="F32")
        for name, tensor in tensors.items()
        if ".moe.experts." not in name
    }
    expert = stored_tensors(config, precision)
    state = {"run": run, "config": config.model_dump(exclude_defaults=True)}  # so that older stores have it too
    contents: dict[str, tuple[dict[str, TensorEntry], dict[str, Any]]] = {BACKBONE: (backbone, state)}
    for layer in range(config.num_layers):
        for index in range(config.num_experts):
            contents[expert_file(layer, index)] = expert, {"run": run, "layer": layer, "expert": index}
    return contents


def safetensors_header(entries: dict[str, TensorEntry], state: dict[str, Any]) -> bytes:
    """The start of a safetensors file: the length of a JSON text, and that text, padded with spaces.

    The state is under one key, as in our checkpoints.
    """
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(state)}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes()
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _places(entries: dict[str, TensorEntry], file_bytes: int) -> list[tuple[str, slice, torch.dtype, Sequence[int]]]:
    """The place of each tensor at the end of a file. Computed once: it is needed at every read."""
    places, end = [], file_bytes - sum(entry.num_bytes() for entry in entries.values())
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes()
        places.append((name, slice(begin, end), DTYPES[entry.dtype], entry.shape))
    return places


def _views(memory: Tensor, places: list[tuple[str, slice, torch.dtype, Sequence[int]]]) -> dict[str, Tensor]:
    return {name: memory[place].view(dtype).view(shape) for name, place, dtype, shape in places}


def _content(tensor: Tensor, entry: TensorEntry) -> bytes:
    if tensor.dtype != DTYPES[entry.dtype]:
        raise ValueError(f"the store holds {entry.dtype} here, not {tensor.dtype}")
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _read_manifest(path: Path) -> Manifest:
    data = read_record(path)
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = [*map(str, first["loc"]), *([first["ctx"]["key"]] if first["type"] == "invalid" else [])]
        where = ".".join(place) or "the whole"
        raise DynarouteError(f"{path}: {where}: {first['msg']}: {REMEDY}") from error


def _hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def _check_file(path: Path, size: int, entries: dict[str, TensorEntry], state: dict[str, Any]) -> None:
    """Checks a file's size, and its header to the byte."""
    expected = safetensors_header(entries, state)
    try:
        with path.open("rb") as file:
            found, found_size = file.read(len(expected)), path.stat().st_size
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: {REMEDY}") from error
    if found != expected:
        raise DynarouteError(f"{path}: belongs to another expert or store, or is damaged: {REMEDY}")
    needed = len(expected) + sum(entry.num_bytes() for entry in entries.values())
    if not found_size == size == needed:
        raise DynarouteError(f"{path}: has {found_size} bytes, the manifest says {size}, it needs {needed}: {REMEDY}")
