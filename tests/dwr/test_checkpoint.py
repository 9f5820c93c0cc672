"""A checkpoint's shards: what they hold by their headers, and headers that lie."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dynaroute.dwr.experts import checkpoint as module
from dynaroute.dwr.experts.checkpoint import INDEX, SINGLE, Checkpoint
from dynaroute.errors import DynarouteError

TENSORS = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(6, dtype=torch.int8).view(2, 3)}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


def rewrite(path: Path, change) -> None:
    """Changes the header of a file: a mapping in place, or a text by return."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    text = (change(header) or json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def refusal(folder: Path) -> str:
    with pytest.raises(DynarouteError) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("chunk", [8, 64, 2**20])
def test_tensors_are_read_as_the_library_wrote_them(folder, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    checkpoint = Checkpoint(folder)
    for name, tensor in TENSORS.items():
        checkpoint.read(name, found := torch.empty_like(tensor))
        assert torch.equal(found, tensor)
        checkpoint.read(name, widened := torch.empty(tensor.shape))
        assert torch.equal(widened, tensor.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(data_offsets=[0, 64]), "damaged: "),
        (lambda h: h["a"].update(shape=[3, 6]), "damaged: "),
        (lambda h: h["a"].update(data_offsets=[8, 68]), "damaged: "),
        (lambda h: h["a"].update(data_offsets=[-60, 0]), "damaged: "),
        (lambda h: h["a"].update(data_offsets=[10**9, 10**9 + 60]), "damaged: "),
        (lambda h: h["a"].update(shape=[15.0]), "damaged: "),
        (lambda h: h["a"].update(dtype="I32"), "tensor a: dtype 'I32': must be one of F32, BF16"),
        (lambda h: h["a"].pop("dtype") and None, "damaged: "),
        (lambda h: h.update(d=h["a"]), "damaged: "),  # two tensors in the same place
        (lambda h: h.pop("c") and None, "damaged: "),
        (lambda h: json.dumps(h)[:-1] + ', "a": ' + json.dumps(h["a"]) + "}", "names a twice"),
        (lambda h: "[1]", "damaged: "),
        (lambda h: "{" * 9, "damaged: "),
    ],
)
def test_a_header_that_lies_is_refused(folder, change, message):
    rewrite(folder / SINGLE, change)
    assert refusal(folder).startswith(f"{folder / SINGLE}: {message}")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_damage_to_a_header_gives_a_place_outside_of_the_file(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    save_file(TENSORS, folder / SINGLE)
    content = bytearray((folder / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 90))] = data.draw(st.sampled_from(b'0123459",:[]{}-\x00\xff'))
    (folder / SINGLE).write_bytes(content)
    try:
        places = Checkpoint(folder).places
    except DynarouteError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            0 < place.begin <= place.begin + torch.Size(place.shape).numel() * place.dtype.itemsize <= len(content)
            for place in places.values()
        )


@pytest.mark.parametrize("size", [0, 7, 20, -1])
def test_a_truncated_file_is_refused(folder, size):
    os.truncate(folder / SINGLE, size % (folder / SINGLE).stat().st_size)
    assert refusal(folder).startswith(f"{folder / SINGLE}: damaged: ")
    (folder / SINGLE).unlink()
    assert refusal(folder) == f"{folder / SINGLE}: cannot be read: No such file or directory"


def test_a_file_that_changes_after_it_was_checked_is_refused(folder):
    checkpoint = Checkpoint(folder)
    save_file({name: tensor + 1 for name, tensor in TENSORS.items()}, folder / SINGLE)
    with pytest.raises(DynarouteError, match=r"model\.safetensors: has changed since it was opened"):
        checkpoint.read("a", torch.empty(3, 5))


def write_index(folder: Path, text: str) -> None:
    for name in TENSORS:
        save_file({name: TENSORS[name]}, folder / f"{name}.safetensors")
    (folder / INDEX).write_text(text)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ('{"a": "a.safetensors", "a": "b.safetensors"}', "names a twice"),
        ('{"a": "../a.safetensors"}', "weight_map.a = '../a.safetensors': must be a .safetensors file beside it"),
        ('{"a": "a.bin"}', "must be a .safetensors file"),
        ('{"a": "a\\u0000.safetensors"}', "must be a .safetensors file"),
        ('{"a": "a\\n.safetensors"}', "must be a .safetensors file"),
        ('["a.safetensors"]', "weight_map = ['a.safetensors']: must name the file of each tensor"),
        ('{"a": 1}', "must be a .safetensors file"),
        ("{}", "must name the file of each tensor"),
        ('{"a": "b.safetensors", "b": "b.safetensors"}', "tensor a is not in b.safetensors"),
        ('{"a": "z.safetensors"}', "z.safetensors: cannot be read"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, named, message):
    write_index(tmp_path, f'{{"weight_map": {named}}}')
    assert message in refusal(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_index(tmp_path, '{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}')
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "b.safetensors")
    assert refusal(tmp_path) == f"{tmp_path / 'b.safetensors'}: tensor a is also in a.safetensors"
