"""What a file or a setting from elsewhere can do: be refused. Nothing in it is ever run."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import REPOSITORY
from small_base import make_base
from small_tokens import write_tokens

from dynaroute.analysis.traces import Trace, load_trace, save_trace
from dynaroute.config import load_settings, read_yaml
from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.embeddings import load_embeddings
from dynaroute.dagformer.hub import load_model
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.data.tokens.tokenizers import load_tokenizer
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.inference import load_resident
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.errors import DynarouteError
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A folder that must not appear; that it would is tried first."""
    path = tmp_path / "was_run"
    pickle.loads(pickle.dumps(Malicious(path)))
    path.rmdir()
    yield path
    assert not path.exists()


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(marker)))


def torch_file(path: Path, marker: Path) -> None:
    torch.save({"weight": Malicious(marker)}, path)


def array_of_objects(path: Path, marker: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Malicious(marker)
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=True)


def checkpoint(folder: Path):
    save_checkpoint(folder / "last.safetensors", {"weight": torch.zeros(3)}, {"step": 1})
    return [folder / "last.safetensors"], lambda: load_checkpoint(folder / "last.safetensors")


def base(folder: Path):
    make_base().save_pretrained(folder)
    return [folder / "model.safetensors", folder / "config.json"], lambda: load_base(folder, "cpu")


def published_base(folder: Path):
    make_base().save_pretrained(folder)
    load = lambda: load_model("base", "AutoModelForCausalLM", folder, "cpu", "auto")  # noqa: E731
    return [folder / "model.safetensors", folder / "config.json"], load


def store(folder: Path):
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_experts": 2, "top_k": 1}
    config = DWRConfig(**sizes, max_seq_len=8, dropout=0.0, capacity_factor=None, vocab_size=64)
    usage = Usage(load=[[0.5, 0.5]] * 2, transitions=[[[1, 1], [1, 1]]])
    export_store(DWRTransformer(config), "run", usage, folder)
    names = ("manifest.json", "backbone.safetensors", "expert_layer1_id0.safetensors")
    return [folder / name for name in names], lambda: load_resident(ExpertStore(folder))


def trace(folder: Path):
    save_trace(Trace("run", np.zeros((4, 2, 1), np.uint16), np.zeros((4, 1, 2), np.uint16)), folder)
    return [folder / f"{name}.npy" for name in ("experts", "lookahead")], lambda: load_trace(folder)


def tokens(folder: Path):
    write_tokens(folder, 64, train=[[1, 2, 3, 0]])
    names = ("train-00000.npy", "train-offsets.npy", "train-sources.npy", "metadata.json")
    return [folder / name for name in names], lambda: TokenShards(folder, "train")


def embeddings(folder: Path):
    (folder / "metadata.json").write_text(
        json.dumps({"embedding_size": 2, "files": {"test": {"windows": 1, "sha256": ""}}})
    )
    return [folder / "test.npy"], lambda: load_embeddings(folder)


def tokenizer(folder: Path):
    return [folder / "tokenizer.json", folder / "gpt2.tiktoken"], lambda: load_tokenizer(folder)


@pytest.mark.parametrize("put", [plain_pickle, torch_file, array_of_objects])
@pytest.mark.parametrize("make", [checkpoint, base, published_base, store, trace, tokens, embeddings, tokenizer])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(tmp_path, marker, make, put):
    (tmp_path / "folder").mkdir()
    paths, load = make(tmp_path / "folder")
    for path in paths:
        before = path.read_bytes() if path.exists() else None
        put(path, marker)
        with pytest.raises(DynarouteError):
            load()
        assert not marker.exists(), path
        path.unlink() if before is None else path.write_bytes(before)


def test_weights_in_a_pickle_beside_the_configuration_are_not_read(tmp_path, marker):
    _, load = published_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch_file(tmp_path / "base/pytorch_model.bin", marker)
    with pytest.raises(DynarouteError, match="cannot be loaded"):
        load()


def test_yaml_makes_no_objects(tmp_path, marker):
    (tmp_path / "params.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(DynarouteError, match=r"params\.yaml"):
        load_settings(tmp_path / "params.yaml")


def test_a_list_of_shards_cannot_name_a_file_elsewhere(tmp_path):
    write_tokens(tmp_path / "elsewhere", 64, train=[[9, 9, 9, 0]])
    write_tokens(tmp_path / "tokens", 64, train=[[1, 2, 3, 0]])
    path = tmp_path / "tokens/metadata.json"
    metadata = json.loads(path.read_text())
    metadata["splits"]["train"]["shards"][0]["file"] = "../elsewhere/train-00000.npy"
    path.write_text(json.dumps(metadata))
    assert TokenShards(tmp_path / "tokens", "train").read(0, 4).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "a b", "a;b", "$(x)", "a\n"])
def test_the_names_of_folders_are_names(tmp_path, name):
    params = read_yaml(REPOSITORY / "params.yaml")
    for key, value in (("corpora", params["corpora"]["docs"]), ("variants", {"from": "base"})):
        (tmp_path / "params.yaml").write_text(json.dumps(params | {key: params[key] | {name: value}}))
        with pytest.raises(DynarouteError, match=key):
            load_settings(tmp_path / "params.yaml")


@pytest.mark.parametrize("file", ["dvc.yaml", "benchmarks/dvc.yaml", "stages/data/dvc.yaml"])
def test_no_command_holds_a_value_of_params(file):
    stages = read_yaml(REPOSITORY / file)["stages"]
    for name, stage in stages.items():
        command = stage.get("do", stage)["cmd"]
        assert "${" not in command, name
