"""Exports a Mixture-of-Experts checkpoint of transformers to one file for each expert, in the precision asked for.

    python -m dynaroute.dwr.export_model --model PATH_OR_HUB_ID --output FOLDER --precision bf16

    config.json, tokenizer files               copied
    model.safetensors.index.json               the file of each tensor
    backbone.safetensors                       everything but the experts, in its own precision
    expert_layer{L}_id{E}.safetensors          one expert; data from a page on
    manifest.json                              precision, and SHA-256 of every file

`generate --model FOLDER` serves it. In fp32 and bf16 it also remains an ordinary checkpoint, which transformers loads.
int8 is symmetric with a scale for each row, and a quarter of fp32 in the cache, too. An interrupted run resumes: files
are finished one by one, in a folder that gets its name in the end.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.dwr.experts.checkpoint import INDEX, CheckpointStore
from dynaroute.dwr.experts.precision import DTYPES, TensorEntry, to_int8
from dynaroute.dwr.experts.store import BACKBONE, MANIFEST, expert_file, safetensors_header
from dynaroute.dwr.hub import locate_checkpoint, open_checkpoint
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import move_directory, output_file, sha256, write_json
from dynaroute.pipeline.terminal import program

PRECISIONS = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or an id of the hub")
    parser.add_argument("--revision", help="commit of a model on the hub")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--precision", required=True, choices=PRECISIONS, help="of the experts")
    return parser.parse_args()


def export_model(folder: Path, output: Path, precision: str) -> None:
    """Exports a checkpoint, one expert at a time in memory.

    Raises:
        DynarouteError: the checkpoint cannot be served, the output exists, or the disk has too little room.
    """
    if output.exists():
        raise DynarouteError(f"--output {output}: exists")
    _, store = open_checkpoint(folder)
    if store.is_quantized:
        raise DynarouteError(f"{folder}: its experts are quantized already")
    entries = file_entries(store, precision)
    headers = {name: safetensors_header(tensors, {}) for name, tensors in entries.items()}
    sizes = {name: len(headers[name]) + sum(entry.num_bytes() for entry in entries[name].values()) for name in entries}
    partial = output.with_name(f".{output.name}.partial")
    source = {"precision": precision, "tensors": repr(sorted(store.checkpoint.places.items()))}
    source = {"source": hashlib.sha256(json.dumps(source).encode()).hexdigest()}
    if not (partial / "source.json").exists() or json.loads((partial / "source.json").read_text()) != source:
        shutil.rmtree(partial, ignore_errors=True)  # of another model
        write_json(partial / "source.json", source)
    done = {name for name in sizes if (partial / name).exists()}  # files are renamed when they are whole
    needed, free = sum(sizes[name] for name in sizes.keys() - done), shutil.disk_usage(partial).free
    if needed > free:
        raise DynarouteError(f"{output}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free")
    with tqdm(total=sum(sizes.values()), desc="export", unit="B", unit_scale=True, disable=None) as progress:
        for name in sizes:
            if name not in done:
                with output_file(partial / name) as path, path.open("wb") as file:
                    file.write(headers[name])
                    for tensor in contents(store, name, entries[name], precision):
                        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            progress.update(sizes[name])
    for path in folder.iterdir():
        if path.suffix in {".json", ".model", ".txt", ".jinja"} and path.name not in {INDEX, MANIFEST}:
            shutil.copyfile(path, partial / path.name)
    weight_map = {tensor: name for name in entries for tensor in entries[name]}
    write_json(partial / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    written = sorted(path for path in partial.iterdir() if path.name not in {"source.json", MANIFEST})
    hashes = {path.name: sha256(path) for path in tqdm(written, desc="SHA-256", disable=None)}
    write_json(partial / MANIFEST, {"precision": precision, "files": hashes})
    (partial / "source.json").unlink()  # last: without it, the next run would begin anew
    move_directory(partial, output)


def file_entries(store: CheckpointStore, precision: str) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of every file, in order."""
    places, kind = store.checkpoint.places, PRECISIONS[precision]
    names = {dtype: name for name, dtype in DTYPES.items()}
    experts = {name for layer in store.names for expert in layer for name in expert}
    backbone = {name: place for name, place in places.items() if name not in experts}
    files = {BACKBONE: {name: TensorEntry(shape=[*p.shape], dtype=names[p.dtype]) for name, p in backbone.items()}}
    for layer, row in enumerate(store.names):
        for expert, parts in enumerate(row):
            tensors = {name: TensorEntry(shape=[*places[name].shape], dtype=kind) for name in parts}
            if precision == "int8":
                scales = {f"{name}_scale": TensorEntry(shape=[places[name].shape[0]], dtype="F32") for name in parts}
                tensors |= scales
            files[expert_file(layer, expert)] = tensors
    return files


def contents(store: CheckpointStore, file: str, entries: dict[str, TensorEntry], precision: str) -> Iterator[Tensor]:
    """The tensors of a file, in order."""
    scales = []
    for name in entries:
        if name in store.checkpoint.places:
            place = store.checkpoint.place(name)
            dtype = place.dtype if file == BACKBONE or precision != "int8" else torch.float32
            store.checkpoint.read(name, tensor := torch.empty(place.shape, dtype=dtype))
            if file != BACKBONE and precision == "int8":
                tensor, scale = to_int8(tensor, 1)
                scales.append(scale)
            yield tensor.to(DTYPES[entries[name].dtype])
    yield from scales


def main() -> None:
    """The command. Ends with one line and status 1 when the user is at fault."""
    with program("export_model"):
        try:
            arguments = parse_arguments()
            folder = locate_checkpoint(arguments.model, arguments.revision)
            export_model(folder, arguments.output, arguments.precision)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
