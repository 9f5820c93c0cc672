"""What the settings name outside of the repository: every edit of it is noticed, and what is missing is named."""

import functools
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import collect
import encode_windows
import locate as locate_stage
import pytest
import tokenize_corpus
from pydantic import TypeAdapter
from repository import REPOSITORY

from dynaroute.config import Settings, load_settings, read_yaml
from dynaroute.config.dagformer import DAGFormer
from dynaroute.config.data import InstalledText, Source, Tokenizer
from dynaroute.config.schema import Section
from dynaroute.data.locate import locate, sections
from dynaroute.errors import DynarouteError

KINDS = {
    "hub": (Source, {"kind": "hub", "name": None, "text_column": "text", "rows": "joined"}),
    "dolma_stream": (Source, {"kind": "dolma_stream", "addresses": "file.json", "files": None}),
    "dolma": (Source, {"kind": "dolma"}),
    "files": (Source, {"kind": "files"}),
    "tokenizer": (Tokenizer, {"kind": "hub"}),
    "base": (DAGFormer.model_fields["base"].annotation, {"kind": "load"}),
    "encoder": (DAGFormer.model_fields["encoder"].annotation, {"kind": "hub"}),
}  # fmt: skip


def section(kind: str, **named: Any) -> Section:
    union, fields = KINDS[kind]
    return TypeAdapter(union).validate_python(fields | named)


def local(kind: str, folder: str) -> dict[str, Any]:
    return {"paths": [f"{folder}/*.json"]} if kind in ("dolma", "files") else {"path": folder, "revision": None}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_in_place_changes_what_is_located_and_another_time_or_place_does_not(here, kind):
    folder = here / "local"
    folder.mkdir()
    (folder / "file.json").write_text("one")
    named = section(kind, **local(kind, "local"))
    before = locate(named, kind)
    os.utime(folder / "file.json", (1, 1))
    (folder / ".cache").mkdir()
    (folder / ".cache/file.json").write_text("of a tool's own")
    assert locate(named, kind) == before
    (folder / "file.json").write_text("two")
    os.utime(folder / "file.json", (1, 1))
    assert locate(named, kind) != before
    (folder / "file.json").write_text("one")
    assert locate(named, kind) == before


def test_a_dataset_may_have_folders_and_the_weights_of_a_model_do_not_concern_its_tokenizer(here):
    (here / "local/below").mkdir(parents=True)
    for name in ("tokenizer.json", "model.safetensors", "below/train.jsonl"):
        (here / "local" / name).write_text(name)
    kinds = ("hub", "tokenizer", "base")
    found = {kind: set(locate(section(kind, **local(kind, "local")), kind)["files"]) for kind in kinds}
    assert found["hub"] == {"tokenizer.json", "model.safetensors", "below/train.jsonl"}
    assert found["base"] == {"tokenizer.json", "model.safetensors"}
    assert found["tokenizer"] == {"tokenizer.json"}


def test_the_shards_of_a_base_are_located_wherever_its_index_says_that_they_are(here):
    (here / "local/weights").mkdir(parents=True)
    (here / "local/weights/a.safetensors").write_text("one")
    (here / "local/model.safetensors.index.json").write_text('{"weight_map": {"w": "weights/a.safetensors"}}')
    before = locate(section("base", **local("base", "local")), "base")
    (here / "local/weights/a.safetensors").write_text("two")
    assert locate(section("base", **local("base", "local")), "base") != before


def test_packages_are_located_by_their_versions_and_what_the_hub_holds_by_its_revision():
    domains = {"code": {"read": "text", "paths": ["pandas/*.py", "numpy/*.py", "numpy/*/*.py"]}}
    source = {"kind": "installed_text", "characters": 1, "domains": domains}
    found = locate(InstalledText.model_validate(source), "")
    assert found == {"packages": {name: importlib.metadata.version(name) for name in ("numpy", "pandas")}}
    found = locate(section("hub", path="Someone/dataset", revision="abc"), "")
    assert found == {"path": "Someone/dataset", "name": None, "revision": "abc", "files": {}}
    assert locate(section("base", path="Someone/model", revision="abc"), "")["files"] == {}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dolma", "files")])
def test_what_the_hub_holds_needs_a_revision_and_a_path_that_is_none_of_its_ids_a_folder(kind):
    with pytest.raises(DynarouteError) as caught:
        locate(section(kind, path="Somebody/something", revision=None), "the.key")
    folder = "" if kind in ("tokenizer", "base", "encoder") else "datasets/"
    assert str(caught.value) == (
        "the.key.revision = None: 'Somebody/something' is no folder here, and of the hub a commit must be named: "
        f"`git ls-remote https://huggingface.co/{folder}Somebody/something HEAD` prints the newest"
    )
    for path in ("/no/such/place", "../models/one", "./models", "~/models", "models/small/one"):
        with pytest.raises(DynarouteError, match=r"^the\.key\.path = .*: no such folder"):
            locate(section(kind, path=path, revision=None), "the.key")


@pytest.mark.parametrize("kind", KINDS)
def test_in_an_experiments_copy_of_the_workspace_a_path_that_only_the_workspace_has_is_to_be_copied(
    here, kind, monkeypatch
):
    copy = here / ".dvc/tmp/exps/tmp1"
    copy.mkdir(parents=True)
    (here / "my models").mkdir()
    (here / "my models/file.json").touch()
    monkeypatch.setenv("DVC_ROOT", str(here))
    monkeypatch.chdir(copy)
    with pytest.raises(DynarouteError, match=r"add --copy-paths 'my models'$"):
        locate(section(kind, **local(kind, "my models")), kind)
    with pytest.raises(DynarouteError) as caught:
        locate(section(kind, **local(kind, "other")), kind)
    assert "--copy-paths" not in str(caught.value)


# --- stages ------------------------------------------------------------------------------------------------------


def test_a_stage_depends_on_what_each_section_names():
    stages = read_yaml(REPOSITORY / "dvc.yaml")["stages"]
    used = {dep for stage in stages.values() for dep in stage.get("do", stage)["deps"]}
    for key in sections(load_settings(REPOSITORY / "params.yaml"), "docs"):
        assert f"data/inputs/{key.replace('docs', '${key}')}.json" in used


@pytest.mark.parametrize("key", ["corpora.docs.tokenizer", "dagformer.base", "dagformer.encoder"])
def test_what_cannot_be_located_stops_the_corpus_that_needs_it_before_any_work_and_no_other(here, key):
    params = read_yaml(REPOSITORY / "params.yaml")
    params["corpora"]["other"] = dict(params["corpora"]["docs"])
    *path, last = key.split(".")
    at = functools.reduce(dict.__getitem__, path, params)
    at[last] = {"kind": "load" if last == "base" else "hub", "path": "Somebody/something", "revision": None}
    settings = Settings.model_validate(params)
    locate_stage.main(settings)
    refused = json.loads((here / f"data/inputs/{key}.json").read_text())["refused"]
    assert refused.startswith(f"{key}.revision = None: 'Somebody/something' is no folder here")
    used_by = {"tokenizer": (tokenize_corpus, "docs"), "encoder": (encode_windows, "training")}
    for stage, name in [(collect, "docs"), *filter(None, [used_by.get(last)])]:
        with pytest.raises(DynarouteError, match=re.escape(refused)):
            stage.main(settings, name)
    assert not (here / "data/raw").exists()
    assert json.loads((here / "data/inputs/corpora.other.tokenizer.json").read_text()) == {"files": {}}
