"""Encoders on tiny random models that go through `from_pretrained`, and the folder of embeddings."""

import itertools
import json
import os
import shutil
from pathlib import Path

import encode_windows
import numpy as np
import pytest
import torch
import transformers
from repository import REPOSITORY
from resuming import contents, killed_at
from safetensors.torch import load_file, save_file
from small_settings import changed as changed_settings
from small_settings import default_settings
from small_tokens import write_tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3Model,
    ViTConfig,
    ViTModel,
)  # fmt: skip

from dynaroute.config import Settings, read_yaml
from dynaroute.config.dagformer import BaseEncoder, HubEncoder
from dynaroute.config.data import ByteBPE
from dynaroute.dagformer import embeddings
from dynaroute.dagformer.embeddings import load_embeddings, write_embeddings
from dynaroute.dagformer.encoders import load_encoder
from dynaroute.data.tokens.documents import domain_windows
from dynaroute.data.tokens.shards import TokenShards, Windows, open_splits
from dynaroute.data.tokens.tokenizers import load_tokenizer, save_tokenizer
from dynaroute.data.tokens.windows import Subset, evenly_spaced
from dynaroute.errors import DynarouteError
from dynaroute.pipeline import artifacts

BASE = BaseEncoder(kind="base")
SEQ_LEN, PREFIX, WIDTH, VOCABULARY = 8, 3, 16, 280
TEXTS = ["the cat sat on the mat, and the other cat sat on the other mat.\n", "def cat(the):\n    return the\n"] * 3
UNEVEN = ["the other cat sat on the other mat", "a", "def cat(the):\n", " "]
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    Olmo2ForCausalLM(Olmo2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenized corpus with all three splits."""
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = save_tokenizer(ByteBPE(kind="bpe", vocab_size=VOCABULARY), TEXTS, folder / "tokenizer")
    splits = {
        split: [[*ids, tokenizer.eot_id] for ids in tokenizer.encode_batch([split + text for text in TEXTS])]
        for split in ("train", "validation", "test")
    }
    return write_tokens(folder, VOCABULARY, tokenizer.eot_id, **splits)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with a tokenizer that differs from the corpus's, as the hub would serve it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder")
    Qwen3Model(Qwen3Config(**SIZES)).save_pretrained(folder)
    save_tokenizer(ByteBPE(kind="bpe", vocab_size=260), TEXTS, folder)
    return folder


@pytest.fixture
def base_encoder(base: Path):
    return load_encoder(BASE, base, None, "cpu")


@pytest.fixture
def windows(tokens: Path) -> dict[str, Subset]:
    numbers = {"train": 7, "validation": 2, "test": 5}
    splits = {split: Windows(own, SEQ_LEN, keep_tail=False) for split, own in open_splits(tokens).items()}
    return {split: evenly_spaced(own, numbers[split], split) for split, own in splits.items()}


def write(encoder, settings, windows: dict[str, Subset], directory: Path) -> None:
    """`write_embeddings` with a scratch folder beside the result."""
    scratch = directory.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    write_embeddings(encoder, {"encoder": settings.model_dump()}, windows, PREFIX, directory, scratch)


def hub(path: Path) -> HubEncoder:
    return HubEncoder(kind="hub", path=str(path), revision=None)


def load_hub(path: Path, tokens: Path):
    return load_encoder(hub(path), "nowhere", load_tokenizer(tokens / "tokenizer"), "cpu")


LACKING = "layers.1.mlp.up_proj.weight"


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON file; None removes a key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def changed_copy(source: Path, target: Path, file: str, **changes) -> Path:
    """The folder with other values in one of its JSON files."""
    shutil.copytree(source, target)
    edit_json(target / file, **changes)
    return target


def assert_frozen(encoder, vectors: torch.Tensor) -> None:
    """And of use in training nevertheless."""
    assert not encoder.model.training and not any(one.requires_grad for one in encoder.model.parameters())
    assert vectors.dtype == torch.float32 and not vectors.requires_grad and not vectors.is_inference()


def test_the_base_encoder_is_the_mean_of_the_last_hidden_states(base_encoder, base):
    ids = torch.randint(VOCABULARY, (3, SEQ_LEN))
    with torch.no_grad():
        output = AutoModelForCausalLM.from_pretrained(base)(ids, output_hidden_states=True)
    found = base_encoder.encode(ids)
    assert_frozen(base_encoder, found)
    assert found.shape == (3, base_encoder.embedding_size) == (3, WIDTH)
    torch.testing.assert_close(found, output.hidden_states[-1].mean(1), rtol=1e-5, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.fixture(scope="module")
def bidirectional_encoder(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, for which it matters where a text begins and what comes after it; without a pooler, as many are."""
    torch.manual_seed(2)
    folder = changed_copy(text_encoder, tmp_path_factory.mktemp("bert") / "encoder", "tokenizer_config.json")
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.5)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<|endoftext|>", None])
@pytest.mark.parametrize("source", ["text_encoder", "bidirectional_encoder"])
def test_padding_never_counts_whichever_side_a_tokenizer_puts_it(source, tokens, tmp_path, side, pad, request):
    changes = {"padding_side": side, "pad_token": pad}
    folder = changed_copy(request.getfixturevalue(source), tmp_path / "copy", "tokenizer_config.json", **changes)
    together = load_hub(folder, tokens).encode_texts(UNEVEN)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == side
    for text, found in zip(UNEVEN, together, strict=True):
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(found, states[0].mean(0).detach(), rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == len(UNEVEN)


def test_a_text_encoder_reads_the_text_of_the_window_with_its_own_tokenizer(text_encoder, tokens):
    encoder, corpus = load_hub(text_encoder, tokens), load_tokenizer(tokens / "tokenizer")
    text = TEXTS[0]
    ids = corpus.encode_batch([text])[0].tolist()
    assert len(ids) != len(encoder.tokenizer(text)["input_ids"])
    found = encoder.encode(torch.tensor([ids]))
    assert_frozen(encoder, found)
    assert torch.equal(found, encoder.encode_texts([text]))
    assert encoder.embedding_size == WIDTH
    with pytest.raises(DynarouteError, match="finds no token in ''"):  # and not a NaN
        encoder.encode_texts(["cat", ""])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_have_the_dtype_of_the_saved_base_or_the_one_asked_for(base, text_encoder, tokens, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path)
    own = load_encoder(BASE, tmp_path, None, "cpu")
    text = load_encoder(hub(text_encoder), "nowhere", load_tokenizer(tokens / "tokenizer"), "cpu", dtype)
    for encoder in (own, text):
        assert encoder.dtype == encoder.model.dtype == dtype
    assert_frozen(text, text.encode_texts(TEXTS[:1]))


def edit_weights(folder: Path, **changes: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors") | changes
    weights = {name: value for name, value in weights.items() if value is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def need_foreign_code(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="unheard_of", auto_map={"AutoConfig": "code.C", "AutoModel": "code.M"})
    (folder / "code.py").write_text("raise SystemExit('foreign code was run')\n")


def put_an_encoder_of_images(folder: Path) -> None:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ""),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), ""),
        (lambda folder: edit_weights(folder, **{LACKING: None}), f"lack 1 of the model's tensors, such as {LACKING}"),
        (lambda folder: edit_weights(folder, **{"norm.weight": torch.ones(1)}), ""),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ""),
        (lambda folder: edit_json(folder / "tokenizer_config.json", eos_token=None), "neither pad_token nor eos_token"),
        (need_foreign_code, ""),
        (put_an_encoder_of_images, "does not encode text"),
    ],
)
def test_an_encoder_that_cannot_be_used_whole_and_safely_is_refused(damage, problem, text_encoder, tokens, tmp_path):
    folder = shutil.copytree(text_encoder, tmp_path / "copy")
    damage(folder)
    with pytest.raises(DynarouteError, match=rf"^dagformer\.encoder\.path: {folder}: [^\n]*{problem}[^\n]*$"):
        load_hub(folder, tokens)


@pytest.mark.parametrize(
    ("kind", "sizes", "limit"),
    [
        # Of 12 positions, two are before the first: RoBERTa counts from after the padding token's.
        ("Roberta", {"max_position_embeddings": 12, "pad_token_id": 1}, 10),
        ("Bert", {"max_position_embeddings": 12}, 12),
        ("XLNet", {"d_head": 8}, 12),  # has -1 positions
        ("T5", {"d_kv": 8, "decoder_start_token_id": 0}, 12),  # has no such key, and a decoder
    ],
)
def test_an_encoder_reads_as_many_tokens_as_it_has_positions(text_encoder, tokens, tmp_path, kind, sizes, limit):
    torch.manual_seed(3)
    length = {"model_max_length": 12 if kind in ("XLNet", "T5") else None}
    folder = changed_copy(text_encoder, tmp_path / "copy", "tokenizer_config.json", **length)
    common = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = getattr(transformers, f"{kind}Config")(intermediate_size=24, **common, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    encoder = load_hub(folder, tokens)
    assert encoder.max_tokens == limit
    assert encoder.model.config._attn_implementation == ("eager" if kind == "XLNet" else "sdpa")
    assert encoder.encode_texts(["5" * limit]).shape == (1, WIDTH)
    with pytest.raises(DynarouteError, match=f"reads at most {limit} tokens, but a window has {limit + 1} of them"):
        encoder.encode_texts(["5" * (limit + 1)])


def test_windows_that_are_too_long_are_refused_before_any_is_encoded(text_encoder, tokens, windows, tmp_path):
    encoder = load_hub(changed_copy(text_encoder, tmp_path / "copy", "config.json", max_position_embeddings=6), tokens)
    encoder.encode = lambda _: pytest.fail("a window is encoded")
    with pytest.raises(DynarouteError, match=r"reads at most 6 tokens, but a window has \d+ of them: lower"):
        write(encoder, hub(text_encoder), windows, tmp_path / "embeddings")


@pytest.mark.parametrize(("kind", "batch"), [("base", embeddings.BATCH_TOKENS), ("base", 2 * SEQ_LEN), ("hub", 16)])
def test_embeddings_are_of_windows_and_of_prefixes_alone(
    kind, batch, base, text_encoder, tokens, windows, tmp_path, monkeypatch
):
    monkeypatch.setattr(embeddings, "BATCH_TOKENS", batch)
    settings = BASE if kind == "base" else hub(text_encoder)
    encoder = load_encoder(settings, base, load_tokenizer(tokens / "tokenizer"), "cpu")
    write(encoder, settings, windows, tmp_path / "embeddings")
    found = load_embeddings(tmp_path / "embeddings")
    assert set(found) == {"train", "validation", "test", "train_prefix", "validation_prefix", "test_prefix"}
    for name, vectors in found.items():
        own = windows[name.removesuffix("_prefix")]
        read = PREFIX if name.endswith("_prefix") else SEQ_LEN
        expected = torch.cat([encoder.encode(own.batch([index])[0][:, :read]) for index in range(len(own))])
        assert vectors.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=1e-4, atol=1e-5)
    metadata = json.loads((tmp_path / "embeddings" / "metadata.json").read_text())
    assert metadata["encoder"] == settings.model_dump()
    assert metadata["embedding_size"] == WIDTH
    read = {name: (own["windows"], own["tokens_read"]) for name, own in metadata["files"].items()}
    numbers = {"train": 7, "validation": 2, "test": 5}
    assert read == {split: (number, SEQ_LEN) for split, number in numbers.items()} | {
        f"{split}_prefix": (number, PREFIX) for split, number in numbers.items()
    }


def test_numbers_that_are_not_finite_stop_the_stage_and_leave_nothing(base_encoder, windows, tmp_path):
    base_encoder.model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(DynarouteError, match="not finite for windows 0 to 6"):
        write(base_encoder, BASE, windows, tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


@pytest.mark.parametrize("crash_at", [0, 1, 2, 3, 5, 7, 8, 9])
def test_a_run_that_died_anywhere_ends_as_one_that_did_not(base_encoder, windows, tmp_path, monkeypatch, crash_at):
    """And does little twice."""
    monkeypatch.setattr(embeddings, "BATCH_TOKENS", 2 * SEQ_LEN)
    monkeypatch.setattr(embeddings, "NOTE_WINDOWS", 4)
    encoded, encode = [], base_encoder.encode
    base_encoder.encode = lambda tokens: encoded.append(tokens) or encode(tokens)
    write(base_encoder, BASE, windows, tmp_path / "whole")
    batches = len(encoded)
    encoded.clear()
    with killed_at(base_encoder, "encode", crash_at):
        write(base_encoder, BASE, windows, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    write(base_encoder, BASE, windows, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert len(encoded) <= batches + 1  # of what was not noted yet
    assert not (tmp_path / "scratch").exists()


def test_a_run_killed_while_it_publishes_encodes_nothing_again(base_encoder, windows, written, tmp_path):
    with killed_at(artifacts, "_replace"):
        write(base_encoder, BASE, windows, tmp_path / "resumed")
    base_encoder.encode = lambda _: pytest.fail("a window is encoded once more")
    write(base_encoder, BASE, windows, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(written)


def test_two_kills_that_leave_a_note_without_its_vectors_do_not_stop_the_third_run(
    base_encoder, windows, written, tmp_path
):
    for step in ("discard", "_write_vectors"):  # once it has published, and then at the start
        with killed_at(embeddings, step):
            write(base_encoder, BASE, windows, tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)  # as DVC does before it runs the stage again
    write(base_encoder, BASE, windows, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(written)


@pytest.fixture
def written(base_encoder, windows, tmp_path) -> Path:
    write(base_encoder, BASE, windows, tmp_path / "embeddings")
    return tmp_path / "embeddings"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "test.npy", 200), "test.npy: missing or damaged"),
        (lambda folder: (folder / "test.npy").unlink(), "test.npy: missing or damaged"),
        (lambda folder: np.save(folder / "test.npy", np.zeros((5, WIDTH))), "test.npy: float64"),
        (lambda folder: np.save(folder / "test.npy", np.zeros((4, WIDTH), "f4")), r"says float32 \(5, 16\)"),
        (lambda folder: (folder / "metadata.json").write_text("{}"), "metadata.json: lacks 'embedding_size'"),
        (lambda folder: (folder / "metadata.json").write_text("[]"), "metadata.json: must be a mapping"),
        (lambda folder: (folder / "metadata.json").unlink(), "metadata.json: cannot be read"),
    ],
)
def test_damaged_embeddings_are_refused_naming_the_file(written, damage, message):
    before = (written / "train.npy").read_bytes()
    torch.from_numpy(load_embeddings(written)["train"]).zero_()
    assert (written / "train.npy").read_bytes() == before
    damage(written)
    with pytest.raises(DynarouteError, match=rf"^{written}.*{message}"):
        load_embeddings(written)


@pytest.fixture
def stage_settings(base, tokens, tmp_path, monkeypatch) -> Settings:
    """Of the stage, in a working directory with what it reads."""
    monkeypatch.chdir(tmp_path)
    Path("data/tokens").mkdir(parents=True)
    Path("data/dagformer/train").mkdir(parents=True)
    Path("data/tokens/docs").symlink_to(tokens)
    Path("data/dagformer/train/base").symlink_to(base)
    windows = {"train_windows": 4, "validation_windows": 1, "eval_windows": 2}
    return default_settings(dagformer={"seq_len": SEQ_LEN, "prefix_tokens": PREFIX, **windows, "encoder": BASE})


PARTS = read_yaml(REPOSITORY / "dvc.yaml")["stages"]["encode_windows"]


@pytest.fixture
def scratch(monkeypatch) -> list[Path]:
    """The scratch folder of every run of the stage, which encodes nothing."""
    folders = []
    monkeypatch.setattr(encode_windows, "write_embeddings", lambda *arguments: folders.append(arguments[-1]))
    return folders


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("train_windows", 3, {"training"}),
        ("validation_windows", 2, {"training"}),
        ("eval_windows", 1, {"evaluation"}),
        ("prefix_tokens", PREFIX - 1, {"evaluation"}),
        ("seq_len", SEQ_LEN - 1, {"training", "evaluation", "domains"}),
    ],
)
def test_a_part_of_the_windows_depends_on_its_own_settings_alone(stage_settings, scratch, key, value, changed):
    """In dvc.yaml, and in the name of the folder that a stopped run resumes from."""
    for settings in (stage_settings, changed_settings(stage_settings, dagformer={key: value})):
        for part in PARTS["foreach"]:
            encode_windows.main(settings, part)
    differ = [one != two for one, two in zip(scratch[:3], scratch[3:], strict=True)]
    assert set(itertools.compress(PARTS["foreach"], differ)) == changed
    listed = {part for part, own in PARTS["foreach"].items() if f"dagformer.{key}" in [*own, *PARTS["do"]["params"]]}
    assert listed == changed


def test_an_encoder_edited_in_place_does_not_resume_with_vectors_of_the_old_one(stage_settings, scratch, text_encoder):
    shutil.copytree(text_encoder, "encoder")
    settings = changed_settings(stage_settings, dagformer={"encoder": hub(Path("encoder"))})
    encode_windows.main(settings, "training")
    encode_windows.main(settings, "training")
    edit_json(Path("encoder/tokenizer_config.json"), edited=True)
    encode_windows.main(settings, "training")
    assert scratch[0] == scratch[1] != scratch[2]


def test_the_stage_encodes_the_windows_that_the_settings_ask_for(stage_settings, base_encoder, tokens):
    for part in PARTS["foreach"]:
        encode_windows.main(stage_settings, part)
    found = {part: load_embeddings(f"data/dagformer/embeddings/{part}") for part in PARTS["foreach"]}
    sizes = {name: len(vectors) for own in found.values() for name, vectors in own.items()}
    drawn = domain_windows(TokenShards(tokens, "test"), SEQ_LEN, stage_settings.analysis.domain_windows)
    domains = {} if drawn is None else {"domains": len(drawn.windows)}
    assert sizes == {"train": 4, "validation": 1, "test": 2, "test_prefix": 2} | domains
    train = evenly_spaced(Windows(TokenShards(tokens, "train"), SEQ_LEN, keep_tail=False), 4, "train")
    expected = base_encoder.encode(train.batch(range(4))[0])
    assert torch.equal(torch.from_numpy(found["training"]["train"]), expected)
