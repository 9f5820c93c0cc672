"""The expert store: its layout on disk, what it loads and when, and what it refuses."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from resuming import contents
from safetensors import safe_open
from small_store import RUN, export, make_model, mapped_files, uniform_usage
from test_model import PAPER

from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.mapping import drop_from_page_cache
from dynaroute.dwr.experts.store import (
    ExpertStore,
    expert_file,
    export_store,
    file_contents,
    safetensors_header,
)
from dynaroute.dwr.model import DWRConfig
from dynaroute.errors import DynarouteError


def edit_manifest(path: Path, change) -> None:
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


def refusal(action) -> str:
    with pytest.raises(DynarouteError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert re.search("run the stage (export_experts|that writes it) again", message)
    return message


# --- layout --------------------------------------------------------------------------------------------------------


def test_every_file_is_read_by_the_safetensors_library(tmp_path):
    model = make_model()
    store = export(tmp_path / "store", model)
    tensors = {}
    for path in sorted(store.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            assert state["run"] == RUN
            is_expert = path.name != "backbone.safetensors"
            prefix = f"layers.{state['layer']}.moe.experts.{state['expert']}." if is_expert else ""
            tensors |= {prefix + name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    trained = model.state_dict()
    assert tensors.keys() == trained.keys()
    assert all(torch.equal(tensors[name], trained[name]) for name in trained)


@pytest.mark.parametrize(("d_model", "d_ff"), [(16, 16), (32, 48), (48, 32)])
def test_an_expert_is_adjacent_aligned_tensors_from_a_page_on(tmp_path, d_model, d_ff):
    model = make_model(d_model=d_model, d_ff=d_ff)
    store = export(tmp_path / "store", model)
    content = (store.path / expert_file(1, 4)).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 4096 == 0
    end = 0
    for name in ("w1", "w2", "b1", "b2"):
        begin, next_end = header[name]["data_offsets"]
        assert begin == end
        assert begin % 64 == 0
        expected = model.state_dict()[f"layers.1.moe.experts.4.{name}"]
        assert content[start + begin : start + next_end] == expected.numpy().tobytes()
        end = next_end
    assert len(content) == start + end


def test_the_paper_model_has_the_published_files():
    contents = file_contents(DWRConfig(**PAPER), RUN, "fp32")
    sizes = {}
    for name, (entries, state) in contents.items():
        data = sum(4 * torch.Size(entry.shape).numel() for entry in entries.values())
        sizes[name] = len(safetensors_header(entries, state)) + data
    backbone = sizes.pop("backbone.safetensors")
    assert len(sizes) == 96
    assert set(sizes.values()) == {4 * 2_099_712 + 4096}
    assert round(4 * 2_099_712 / 2**20, 2) == 8.01
    assert round(backbone / 2**20, 1) == 221.8
    assert round((backbone + sum(sizes.values())) / 2**20) == 991


def test_an_export_gives_the_same_bytes_every_time(tmp_path):
    first, second = export(tmp_path / "first"), export(tmp_path / "second")
    assert contents(first.path) == contents(second.path)


def test_an_export_replaces_the_older_store_as_a_whole_or_leaves_it_if_it_fails(tmp_path):
    export(tmp_path / "store", make_model(num_experts=7))
    store = export(tmp_path / "store", make_model(num_experts=5))
    assert len(list(store.path.iterdir())) == 2 * 5 + 2  # experts, backbone and manifest
    with pytest.raises(ValueError, match="float64"):
        export_store(make_model(seed=1).double(), RUN, uniform_usage(make_model()), store.path)
    ExpertStore(store.path).verify()
    assert list(tmp_path.iterdir()) == [store.path]


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_an_expert_is_the_one_exported_and_aligned(tmp_path, precision):
    model = make_model()
    store = export(tmp_path / "store", model, precision=precision)
    weights, vectors = {"fp32": (4, 320), "bf16": (2, 320), "int8": (1, 2 * 320)}[precision]
    assert store.file_bytes - 4096 == weights * 2 * 32 * 48 + vectors
    for layer in range(2):
        for expert, expected in model.layers[layer].moe.experts.fetch([0, 1, 2, 3, 4]):
            weights, mapped = store.read(layer, expert), store.views(store.map(layer, expert))
            for name in ("w1", "b1", "w2", "b2"):
                exact = precision == "fp32" or name.startswith("b")
                error = 0 if exact else getattr(expected, name).detach().abs().max() / 200
                torch.testing.assert_close(getattr(weights, name), getattr(expected, name), rtol=0, atol=float(error))
                for tensor in (getattr(weights, name), mapped[name]):
                    assert tensor.data_ptr() % 64 == 0
                    assert tensor.is_contiguous()


def test_a_channel_of_int8_weights_has_its_own_scale(tmp_path):
    model = make_model()
    with torch.no_grad():
        weights = next(iter(model.layers[0].moe.experts.fetch([0])))[1]
        weights.w1[:, 3] *= 1000
        weights.w1[:, 4] = 0
    store = export(tmp_path / "store", model, precision="int8")
    stored = store.views(store.map(0, 0))
    found = store.read(0, 0).w1
    assert stored["w1"].dtype == torch.int8
    assert torch.equal(stored["w1"].abs().amax(0)[[0, 3, 4]], torch.tensor([127, 127, 0], dtype=torch.int8))
    assert ((found - weights.w1).abs() <= stored["scale1"] / 2 * (1 + 1e-5)).all()  # half a step, in every channel


def test_only_experts_in_use_are_mapped(tmp_path):
    store = export(tmp_path / "store")
    store.verify()
    store.read(0, 0)
    assert mapped_files(store.path) == set()
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    content, other = store.map(0, 1), store.map(1, 2)
    assert len(list(descriptors.iterdir())) == before
    assert mapped_files(store.path) == {expert_file(0, 1), expert_file(1, 2)}
    bias = store.views(content)["b2"]  # one tensor keeps the map of all
    del content
    assert mapped_files(store.path) == {expert_file(0, 1), expert_file(1, 2)}
    assert bias.sum().isfinite()
    del bias, other
    assert mapped_files(store.path) == set()


def test_writing_to_weights_does_not_change_the_store(tmp_path):
    store = export(tmp_path / "store")
    store.map(0, 0).zero_()
    store.verify()
    assert store.read(0, 0).w1.any()


def test_experts_dropped_from_the_page_cache_are_read_again(tmp_path):
    store = export(tmp_path / "store")
    expected = store.read(0, 1)
    drop_from_page_cache(store.path / expert_file(0, 1))
    assert all(map(torch.equal, store.read(0, 1), expected))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat/template.txt", "gpt2.tiktoken"])
@pytest.mark.parametrize("content", [b"{ }", None])
def test_a_store_with_another_tokenizer_is_refused_at_open(tmp_path, name, content):
    (tmp_path / "tokenizer/chat").mkdir(parents=True)
    for own in ("tokenizer.json", "chat/template.txt"):
        (tmp_path / "tokenizer" / own).write_text("{}")
    model, path = make_model(), tmp_path / "store"
    export_store(model, RUN, uniform_usage(model), path, tokenizer=tmp_path / "tokenizer")
    ExpertStore(path).verify()
    assert contents(path / "tokenizer") == contents(tmp_path / "tokenizer")
    if content is None:
        shutil.rmtree(path / "tokenizer")
    else:
        (path / "tokenizer" / name).write_bytes(content)
    assert "store/tokenizer/" in (message := refusal(lambda: ExpertStore(path)))
    assert content is None or name in message
    edit_manifest(path, lambda data: data.update(format=3, tokenizer=None))
    ExpertStore(path).verify()  # the format before did not hash it


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backbone.safetensors", expert_file(1, 2)])
def test_verify_finds_a_flipped_bit(tmp_path, name):
    store = export(tmp_path / "store")
    store.verify()
    content = bytearray((store.path / name).read_bytes())
    content[-1] ^= 1
    (store.path / name).write_bytes(content)
    opened = ExpertStore(store.path)  # it looks the same
    assert name in refusal(opened.verify)
    assert name in refusal(opened.read_backbone if name.startswith("backbone") else lambda: opened.map(1, 2))


def replaced(name: str, change):
    """A damage: other bytes in a file of the store, or none."""

    def damage(path: Path) -> None:
        content = change((path / name).read_bytes())
        (path / name).unlink() if content is None else (path / name).write_bytes(content)

    return damage


def another(path: Path, run: str = RUN, **sizes) -> Path:
    """The expert of another store."""
    return export(path.with_name("other"), make_model(**sizes), run=run).path / EXPERT


def truncate_also_in_the_manifest(path: Path) -> None:
    content = (path / EXPERT).read_bytes()[:-64]
    (path / EXPERT).write_bytes(content)
    edit_manifest(path, lambda data: data["files"][EXPERT].update(bytes=len(content)))


OUTSIDE = "../outside.safetensors"
EXPERT, FILES = expert_file(0, 4), ("backbone.safetensors", expert_file(0, 4))
JUNK = [b"", b"junk", b"\xff" * 8000, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]" * 5000]
CHANGES = [lambda old: old[:-1], lambda old: old[:-5000], lambda old: old + b"\0", lambda _: None]
OTHER = f"{EXPERT}: belongs to another expert or store"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((replaced(name, change), name) for name in FILES for change in CHANGES),
        *((replaced(EXPERT, lambda _, junk=junk: junk), EXPERT) for junk in JUNK),
        *((replaced("manifest.json", lambda _, new=new: new), "manifest") for new in (None, b"{", b"[]", b"\xff\xfe")),
        (lambda path: shutil.copy(another(path, "fedcba9876543210"), path), OTHER),
        (lambda path: shutil.copy(another(path, d_ff=64), path), OTHER),
        (lambda path: shutil.copy(path / expert_file(0, 1), path / EXPERT), OTHER),
        (lambda path: shutil.copy(path / expert_file(1, 4), path / EXPERT), OTHER),
        (lambda path: edit_manifest(path, lambda data: data["files"][EXPERT].update(bytes=4096)), EXPERT),
        (truncate_also_in_the_manifest, EXPERT),
    ],
)
def test_a_file_that_is_not_the_one_exported_is_refused_at_open(tmp_path, damage, message):
    path = export(tmp_path / "store").path
    damage(path)
    with pytest.raises(DynarouteError, match=rf"^[^\n]*{message}[^\n]*$"):
        ExpertStore(path)


@pytest.mark.parametrize("change", [lambda path: os.truncate(path, 5000), Path.unlink])
def test_a_file_lost_after_opening_is_refused_at_read(tmp_path, change):
    store = export(tmp_path / "store")
    change(store.path / expert_file(0, 3))
    store.read(0, 2)
    assert expert_file(0, 3) in refusal(lambda: store.read(0, 3))
    assert expert_file(0, 3) in refusal(store.verify)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data.pop("run"), "run"),
        (lambda data: data.update(format=1), "format"),
        (lambda data: data.pop("tokenizer"), "tokenizer"),
        (lambda data: data.update(surprise=1), "surprise"),
        (lambda data: data["config"].update(d_model=33), "config"),
        (lambda data: data["config"].update(num_experts=4), "usage.load"),
        (lambda data: data["usage"]["load"][0].append(0.0), "usage.load"),
        (lambda data: data["usage"]["transitions"][0][3].pop(), "usage.transitions"),
        (lambda data: data.update(precision="int8"), "files"),
        (lambda data: data["files"].pop(expert_file(0, 0)), "files"),
        (lambda data: data["files"].update({OUTSIDE: data["files"].pop(expert_file(0, 0))}), "files"),
        (lambda data: data["files"].update({OUTSIDE: data["files"][expert_file(0, 0)]}), "files"),
        (lambda data: data["files"][expert_file(0, 0)]["tensors"]["w1"].update(shape=[48, 32]), "files"),
        (lambda data: data["files"][expert_file(0, 0)]["tensors"]["w1"].update(dtype="F64"), "dtype"),
        (lambda data: data["files"][expert_file(0, 0)].update(bytes="12"), "bytes"),
    ],
)
def test_a_manifest_that_describes_no_such_model_is_refused(tmp_path, change, named):
    path = export(tmp_path / "store").path
    shutil.copy(path / expert_file(0, 0), tmp_path / "outside.safetensors")
    edit_manifest(path, change)
    message = refusal(lambda: ExpertStore(path))
    assert "manifest.json: " in message
    assert named in message


def test_a_store_of_the_format_before_is_read_unless_it_weighed_a_single_expert_by_one(tmp_path):
    for top_k in (2, 1):
        path = export(tmp_path / f"store{top_k}", make_model(top_k=top_k)).path
        edit_manifest(path, lambda data: data.update(format=2, tokenizer=None))
    assert ExpertStore(tmp_path / "store2").config.top_k == 2
    assert "format: must be 3 or 4 with top_k = 1" in refusal(lambda: ExpertStore(tmp_path / "store1"))


def test_experts_held_in_memory_are_served_without_their_files(tmp_path):
    store = export(tmp_path / "store")
    expected = {key: store.read(*key) for key in itertools.product(range(2), range(5))}
    store.hold_in_memory()
    shutil.rmtree(tmp_path / "store")
    for key, weights in expected.items():
        assert all(map(torch.equal, store.read(*key), weights))
        assert all(view.data_ptr() % 64 == 0 for view in store.views(store.map(*key)).values())


# --- a store that is replaced while it is open ---------------------------------------------------------------------


def each_file(change):
    """Replaces a store's files one by one: `change` gets a file's path and that of the other model's file."""

    def replace(path: Path, other: Path) -> None:
        for source in other.glob("*.safetensors"):
            change(path / source.name, source)

    return replace


REPLACEMENTS = {
    "folder renamed": lambda path, other: (path.rename(path.with_name("old")), other.rename(path)),
    "exported again": lambda path, other: export(path, make_model(seed=1)),
    "files renamed": each_file(lambda path, source: source.rename(path)),
    "files linked": each_file(lambda path, source: (path.unlink(), path.symlink_to(source))),
    "deleted": lambda path, other: shutil.rmtree(path),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_store_replaced_while_open_gives_the_old_weights_or_fails(tmp_path, replace):
    model = make_model()
    trained = {key: next(iter(model.layers[key[0]].moe.experts.fetch([key[1]])))[1] for key in ((0, 0), (1, 2), (1, 4))}
    store, other = export(tmp_path / "store", model), export(tmp_path / "other", make_model(seed=1))
    backbone = store.read_backbone()
    with ExpertCache(store, 2) as cache:
        for layer, expert in [(0, 0), (1, 2)]:  # read and held; (1, 4) is neither
            list(cache.fetch(layer, [expert]))
        replace(store.path, other.path)
        for (layer, expert), expected in trained.items():
            for read in (lambda *key: next(cache.fetch(key[0], [key[1]]))[1], store.read):
                with contextlib.suppress(DynarouteError):
                    assert all(map(torch.equal, read(layer, expert), expected))
        with contextlib.suppress(DynarouteError):
            assert all(map(torch.equal, store.read_backbone().values(), backbone.values()))


@pytest.mark.parametrize("name", ["backbone.safetensors", expert_file(0, 0)])
def test_the_same_bytes_put_in_place_while_a_store_is_open_are_the_same_model(tmp_path, name):
    store = export(tmp_path / "store")
    before = [*store.read_backbone().values(), *store.read(0, 0)]
    shutil.copy(store.path / name, tmp_path)
    (tmp_path / name).replace(store.path / name)
    os.link(store.path / name, tmp_path / name)  # as DVC does; changes the time stamp of the inode
    assert all(map(torch.equal, [*store.read_backbone().values(), *store.read(0, 0)], before))


def test_a_file_is_hashed_again_only_if_it_may_have_changed(tmp_path, monkeypatch):
    store, hashed = export(tmp_path / "store"), []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda content: hashed.append(1) or sha256(content))
    for _ in range(3):
        store.read(0, 0)
    assert len(hashed) == 1
    (store.path / expert_file(0, 0)).touch()
    store.read(0, 0)
    assert len(hashed) == 2
