import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dynaroute.config.data import GPT2, ByteBPE, Hub, HubTokenizer
from dynaroute.data.text.sources import documents
from dynaroute.data.tokens.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from dynaroute.errors import DynarouteError

BPE = ByteBPE(kind="bpe", vocab_size=280)
TEXTS = ["the cat sat on the mat, and the other cat sat on the other mat.\n", "def cat(the):\n    return the\n"] * 3
HOSTILE = "a<|endoftext|>b <|endoftext|>"


def encode(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(list(texts))]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    save_tokenizer(BPE, TEXTS, folder)
    return folder


@pytest.fixture
def gpt2_files(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))


@given(st.text())
def test_any_text_survives_encoding_and_decoding(bpe_folder, text):
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.decode(encode(tokenizer, text)[0]) == text


def test_a_trained_bpe_has_the_size_asked_for_and_merges_what_is_frequent(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.vocab_size == 280
    assert tokenizer.ids.tolist() == list(range(280))
    assert len(encode(tokenizer, " the")[0]) == 1
    assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"


def test_special_tokens_inside_a_text_are_ordinary_text(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    (ids,) = encode(tokenizer, HOSTILE)
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == HOSTILE


def test_training_gives_the_same_bytes_on_every_run_and_any_number_of_threads(tmp_path, bpe_folder):
    code = (
        "import sys; from dynaroute.config.data import ByteBPE\n"
        "from dynaroute.data.tokens.tokenizers import save_tokenizer\n"
        f"save_tokenizer(ByteBPE(kind='bpe', vocab_size=280), {TEXTS!r}, sys.argv[1])"
    )
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / threads)], env=environment, check=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / threads / name).read_bytes() == (bpe_folder / name).read_bytes()


def test_a_text_too_small_for_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(DynarouteError, match=r"vocab_size = 280: the training text yields only 2\d\d tokens"):
        save_tokenizer(BPE, ["ab ab"], tmp_path)


def test_transformers_loads_a_trained_bpe_and_encodes_alike(bpe_folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(bpe_folder), load_tokenizer(bpe_folder)
    text = "The cat's mat ,  Zwölf \U0001f600 .\n"
    assert theirs(text)["input_ids"] == encode(ours, text)[0]
    assert theirs.decode(encode(ours, text)[0]) == text
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == ("<|endoftext|>", ours.eot_id, ours.vocab_size)


def test_a_hub_tokenizer_is_saved_whole_and_adds_nothing(tmp_path, bpe_folder):
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained(bpe_folder, bos_token="<s>", eos_token="</s>")
    original.add_tokens(["<s>", "</s>"], special_tokens=True)
    original.backend_tokenizer.enable_truncation(3)
    begin = ("<s>", original.bos_token_id)
    original.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    original.save_pretrained(tmp_path / "original")
    settings = HubTokenizer(kind="hub", path=str(tmp_path / "original"), revision=None)
    tokenizer = save_tokenizer(settings, iter(()), tmp_path / "saved")
    assert (tokenizer.vocab_size, tokenizer.decode([tokenizer.eot_id])) == (282, "</s>")
    text = "the cat</s> sat on the mat"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"][0] == begin[1]  # ours must not
    assert tokenizer.decode(encode(tokenizer, text)[0]) == text
    assert encode(tokenizer, text) == encode(load_tokenizer(tmp_path / "saved"), text)
    assert tokenizer.eot_id not in encode(tokenizer, text)[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "</s>"


def test_gaps_in_a_vocabulary_are_no_tokens(tmp_path, bpe_folder):
    content = json.loads((bpe_folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    *_, last = vocabulary
    vocabulary[last] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((bpe_folder / "tokenizer_config.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 301
    assert tokenizer.ids.tolist() == [*range(279), 300]
    assert all(tokenizer.decode([token]) for token in tokenizer.ids.tolist())


def test_a_hub_tokenizer_that_cannot_be_used_is_named(tmp_path, bpe_folder):
    from transformers import AutoTokenizer

    (tmp_path / "empty").mkdir()
    with pytest.raises(DynarouteError, match=r"tokenizer\.path: .*empty: cannot be loaded"):
        save_tokenizer(HubTokenizer(kind="hub", path=str(tmp_path / "empty"), revision=None), [], tmp_path / "out")
    for number, content in enumerate(['{"x": 1}', "[]", "{"]):
        folder = tmp_path / f"broken{number}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(DynarouteError, match=r"tokenizer\.path: .*broken\d: cannot be loaded"):
            save_tokenizer(HubTokenizer(kind="hub", path=str(folder), revision=None), [], tmp_path / "out")
    endless = AutoTokenizer.from_pretrained(bpe_folder)
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(DynarouteError, match=r"endless has no end-of-text token"):
        save_tokenizer(HubTokenizer(kind="hub", path=str(tmp_path / "endless"), revision=None), [], tmp_path / "out")


def test_gpt2_from_its_folder_is_gpt2(tmp_path, gpt2_files, shared_data, monkeypatch):
    save_tokenizer(GPT2(kind="gpt2"), iter(()), tmp_path)
    monkeypatch.setattr(tiktoken, "get_encoding", None)  # nothing is fetched to load it
    tokenizer = load_tokenizer(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    reference = tiktoken.get_encoding("gpt2")
    texts = [HOSTILE, "  \n\n  spaces   \t\n", "it's 1234 Zwölf \U0001f600", ""]
    texts += [(shared_data / "wikitext" / "wiki.valid.tokens").read_text("utf-8")[:100_000]]
    encoded = encode(tokenizer, *texts)
    assert encoded == [reference.encode_ordinary(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)
    assert tokenizer.ids.tolist() == list(range(50257))


def test_the_wikitext2_test_split_is_287644_gpt2_tokens(tmp_path, gpt2_files, shared_data, monkeypatch):
    import datasets
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = (shared_data / "wikitext" / "wiki.test.raw").read_text("utf-8").removesuffix("\n").split("\n")
    rows = [f"{line}\n" if line.strip() else "" for line in lines]  # as the hub has them
    assert len(rows) == 4358
    (tmp_path / "dataset").mkdir()
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "dataset" / "test-00000-of-00001.parquet")
    place = {"path": str(tmp_path / "dataset"), "name": None, "revision": None}
    parts = documents(Hub(kind="hub", **place, text_column="text", rows="joined"))
    tokenizer = save_tokenizer(GPT2(kind="gpt2"), iter(()), tmp_path / "tokenizer")
    assert len(encode(tokenizer, "".join(part.text for part in parts))[0]) == 287_644


@pytest.mark.parametrize("damage", ["", "!!!", "AAA= x", "AAAA 1 2"])
def test_a_damaged_token_file_is_named(tmp_path, damage):
    (tmp_path / "gpt2.tiktoken").write_text(damage + "\n")
    with pytest.raises(DynarouteError, match=r"gpt2\.tiktoken: not a readable token file"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_folder_is_named(tmp_path, bpe_folder):
    with pytest.raises(DynarouteError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    with pytest.raises(DynarouteError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(DynarouteError, match=r"tokenizer_config\.json: eos_token = '<none>'"):
        load_tokenizer(tmp_path)
