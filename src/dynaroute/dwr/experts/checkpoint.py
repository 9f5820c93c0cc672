"""The shards of an ordinary checkpoint as an expert store, without conversion: an index of byte ranges.

A safetensors file is a JSON header with the place of every tensor, then the tensors. Headers are checked when a
checkpoint is opened. An expert is read straight into its slot, in the precision of the file, and leaves nothing in the
page cache, so a cache of experts takes the memory of its slots and no more. Weights are widened to 32-bit floats while
they are multiplied (`precision.linear`).
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynaroute.dwr.experts.mapping import PAGE, Version
from dynaroute.dwr.experts.precision import DTYPES
from dynaroute.dwr.experts.store import Usage
from dynaroute.errors import DynarouteError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 1 * 2**20  # bytes read at a time, which a read leaves in the page cache for a moment


class Place(NamedTuple):
    """Where a tensor is."""

    path: Path
    version: Version  # of the file whose header was read
    begin: int  # byte in the file
    dtype: torch.dtype
    shape: tuple[int, ...]


class GatedWeights(NamedTuple):
    """One expert's weights as rows (out, in), of any precision; with int8, `w[o] = scale[o] * q[o]`."""

    gate_up: Tensor  # [2F, D], the gate's rows first
    down: Tensor  # [D, F]
    gate_up_scale: Tensor | None = None  # [2F]
    down_scale: Tensor | None = None  # [D]


class Sizes(NamedTuple):
    """The sizes of a model that a cache needs; layers are those with experts."""

    num_layers: int
    num_experts: int  # per layer
    top_k: int


class Checkpoint:
    """The tensors of a checkpoint by name. Files are not kept open; one that has changed since is refused.

    Attributes:
        places: where each tensor is.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads and checks the headers of all shards.

        Raises:
            DynarouteError: naming the file that is missing or damaged, or names a tensor that another file has.
        """
        self.folder = Path(folder)
        self.places: dict[str, Place] = {}
        index = self.folder / INDEX
        named = _weight_map(index) if index.exists() else {}
        for file in sorted({*named.values()}) or [SINGLE]:
            for name, place in _read_header(self.folder / file).items():
                if name in self.places:
                    raise DynarouteError(f"{place.path}: tensor {name} is also in {self.places[name].path.name}")
                self.places[name] = place
        for name, file in named.items():
            if name not in self.places or self.places[name].path.name != file:
                raise DynarouteError(f"{index}: tensor {name} is not in {file}")

    def place(self, name: str) -> Place:
        """Where a tensor is. Raises DynarouteError if no file has it."""
        if name not in self.places:
            raise DynarouteError(f"{self.folder}: no file has the tensor {name}")
        return self.places[name]

    def read(self, name: str, out: Tensor) -> None:
        """Reads a tensor into a contiguous one of its shape, and drops what it read from the page cache. Thread-safe.

        Another dtype than the file's is converted, a piece at a time.

        Raises:
            DynarouteError: the file cannot be read, is truncated or has changed.
        """
        place, target = self.place(name), out.view(-1)
        piece = CHUNK // place.dtype.itemsize
        try:
            descriptor = os.open(place.path, os.O_RDONLY)
            try:
                if Version.of(os.fstat(descriptor)) != place.version:
                    raise DynarouteError(f"{place.path}: has changed since it was opened")
                if hasattr(os, "posix_fadvise"):  # or the kernel reads more than was asked for
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                for start in range(0, target.numel(), piece):
                    part = target[start : start + piece]
                    content = part if out.dtype == place.dtype else torch.empty(len(part), dtype=place.dtype)
                    self._read_piece(descriptor, place.path, place.begin + start * place.dtype.itemsize, content)
                    if content is not part:
                        part.copy_(content)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DynarouteError(f"{place.path}: cannot be read: {error.strerror}") from error

    def _read_piece(self, descriptor: int, path: Path, begin: int, out: Tensor) -> None:
        buffer = memoryview(out.view(torch.uint8).numpy())
        done = 0
        while done < len(buffer):
            if not (count := os.preadv(descriptor, [buffer[done:]], begin + done)):
                raise DynarouteError(f"{path}: ends at byte {begin + done}: truncated")
            done += count
        if hasattr(os, "posix_fadvise"):
            first = begin // PAGE * PAGE
            end = -(-(begin + done) // PAGE) * PAGE
            os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_DONTNEED)


class CheckpointStore:
    """The experts of a checkpoint, as a cache reads them.

    Attributes:
        config: sizes of the model.
        num_experts: in all layers together.
        expert_bytes: memory of one expert in a cache.
        file_bytes: bytes that one read reads.
        in_place: whether experts are used where they are mapped; here they never are.
        names: for each layer and expert, its tensors.
        is_quantized: whether experts have scales.
        usage: usage of experts, from a profile; None without one.
    """

    in_place = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Sequence[Sequence[Sequence[str]]],
        top_k: int,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Checks the experts' tensors.

        Args:
            checkpoint: its files.
            names: for each layer and expert, the tensors gate [F, D], up [F, D] and down [D, F]; of int8 weights also
                their scales, in this order.
            top_k: experts of a token.
            hashes: SHA-256 of files, of an export with one expert in each; checked when an expert is first read.

        Raises:
            DynarouteError: a tensor is missing, or differs from the first expert's in shape or dtype.
        """
        self.checkpoint, self.names, self._hashes = checkpoint, names, dict(hashes or {})
        self.config = Sizes(len(names), len(names[0]), top_k)
        self.num_experts = self.config.num_layers * self.config.num_experts
        self.usage: Usage | None = None
        first = [checkpoint.place(name) for name in names[0][0]]
        gate, _, down, *scales = first
        for place, shape in zip(first, [gate.shape, gate.shape, gate.shape[::-1]], strict=False):
            if place.shape != shape or len(shape) != 2 or place.dtype != gate.dtype:
                raise DynarouteError(f"{place.path}: {names[0][0]}: are no gate [F, D], up [F, D] and down [D, F]")
        for expert in (expert for layer in names for expert in layer):
            for name, expected in zip(expert, first, strict=True):
                if (place := checkpoint.place(name))[3:] != expected[3:]:
                    found = f"{place.dtype} {list(place.shape)}, not {expected.dtype} {list(expected.shape)}"
                    raise DynarouteError(f"{place.path}: tensor {name} is {found} as the first expert's")
        width = gate.shape[0]
        shapes = {"gate_up": (2 * width, gate.shape[1]), "down": down.shape}
        self.is_quantized = bool(scales)
        if scales:
            shapes |= {"gate_up_scale": (2 * width,), "down_scale": (down.shape[0],)}
        self._layout, self.expert_bytes = [], 0
        for name, shape in shapes.items():  # each at a multiple of 64 bytes
            dtype = torch.float32 if name.endswith("scale") else gate.dtype
            size = math.prod(shape) * dtype.itemsize
            self._layout.append((name, slice(self.expert_bytes, self.expert_bytes + size), dtype, shape))
            self.expert_bytes += -(-size // 64) * 64
        self.file_bytes = sum(math.prod(place.shape) * place.dtype.itemsize for place in first)

    def new_weights(self, device: str = "cpu") -> GatedWeights:
        """Uninitialised weights of one expert, in one block of memory."""
        return GatedWeights(**self.views(torch.empty(self.expert_bytes, dtype=torch.uint8, device=device)))

    def views(self, content: Tensor) -> dict[str, Tensor]:
        """An expert's tensors from its block of memory."""
        return {name: content[place].view(dtype).view(shape) for name, place, dtype, shape in self._layout}

    def map(self, layer: int, expert: int) -> Tensor:
        """An expert in new memory, uint8 [expert_bytes], to be copied to a GPU. Raises as `load`."""
        content = torch.empty(self.expert_bytes, dtype=torch.uint8)
        self.load(layer, expert, GatedWeights(**self.views(content)))
        return content

    def load(self, layer: int, expert: int, memory: GatedWeights) -> GatedWeights:
        """Reads an expert into memory. Thread-safe.

        Raises:
            DynarouteError: see `Checkpoint.read`.
        """
        parts = [*memory.gate_up.chunk(2), memory.down]
        if memory.gate_up_scale is not None:
            parts += [*memory.gate_up_scale.chunk(2), memory.down_scale]
        names = self.names[layer][expert]
        for name, part in zip(names, parts, strict=True):
            self.checkpoint.read(name, part)
        first = self.checkpoint.place(names[0])
        if expected := self._hashes.get(first.path.name):
            with first.path.open("rb") as file:
                digest = hashlib.sha256(file.read(first.begin))
            for part in parts:
                digest.update(part.view(-1).view(torch.uint8).numpy())
            if digest.hexdigest() != expected:
                raise DynarouteError(f"{first.path}: SHA-256 is {digest.hexdigest()}, not {expected}: export it again")
            del self._hashes[first.path.name]  # from now on, a change of the file shows in its version
        return memory

    def files(self) -> set[str]:
        """The names of the files that hold experts."""
        places = self.checkpoint.places
        return {places[name].path.name for layer in self.names for expert in layer for name in expert}


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index."""
    named = _parse(path, path.read_bytes()).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DynarouteError(f"{path}: weight_map = {named!r:.80}: must name the file of each tensor")
    for name, file in named.items():
        plain = isinstance(file, str) and file.isprintable() and Path(file).name == file  # without NUL or newline
        if not plain or not file.endswith(".safetensors"):
            raise DynarouteError(f"{path}: weight_map.{name} = {file!r:.80}: must be a .safetensors file beside it")
    return named


def _read_header(path: Path) -> dict[str, Place]:
    """The places of a file's tensors. The library checks that they fill it without gaps or overlaps."""
    try:
        with path.open("rb") as file:
            version = Version.of(os.fstat(file.fileno()))
            with safe_open(path, "pt"):
                start = 8 + int.from_bytes(file.read(8), "little")
                header = _parse(path, file.read(start - 8))
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DynarouteError(f"{path}: damaged: {error}") from error
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise DynarouteError(f"{path}: tensor {name}: dtype {entry['dtype']!r}: must be one of {allowed}")
        begin = start + entry["data_offsets"][0]
        places[name] = Place(path, version, begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, of which parsers would silently keep one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise DynarouteError(f"{path}: names {next(key for key in keys if keys.count(key) > 1)} twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DynarouteError(f"{path}: damaged, not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise DynarouteError(f"{path}: must be a mapping, not {type(data).__name__}")
    return data
