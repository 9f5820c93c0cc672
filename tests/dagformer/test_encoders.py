"""Encoders on tiny random models that go through `from_pretrained`, and the folder of embeddings."""

import copy
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import encode_windows
import numpy as np
import pytest
import torch
from repository import REPOSITORY
from resuming import contents, killed_at
from safetensors.torch import load_file, save_file
from small_settings import changed as changed_settings
from small_settings import default_settings
from small_tokens import write_tokens

from dynaroute.config import Settings, read_yaml
from dynaroute.config.dagformer import BaseEncoder, HubEncoder
from dynaroute.config.data import ByteBPE
from dynaroute.dagformer import embeddings
from dynaroute.dagformer.embeddings import load_embeddings, write_embeddings
from dynaroute.dagformer.encoders import load_encoder
from dynaroute.dagformer.windows import variant_windows
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
    from transformers import Olmo2Config, Olmo2ForCausalLM

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
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder")
    Qwen3Model(Qwen3Config(**SIZES)).save_pretrained(folder)
    save_tokenizer(ByteBPE(kind="bpe", vocab_size=260), TEXTS, folder)
    return folder


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


def changed_copy(source: Path, target: Path, file: str, **changes) -> Path:
    """The folder with other values in one of its JSON files; None removes a key."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    values = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return target


@pytest.mark.parametrize(("split", "key"), [("train", "train_windows"), ("test", "eval_windows")])
def test_too_few_windows_for_a_variant_name_the_setting(tokens, split, key):
    settings = default_settings(dagformer={"seq_len": SEQ_LEN, key: 999}).dagformer
    with pytest.raises(DynarouteError, match=rf"^params.yaml: dagformer.{key} = 999: must be at most .* {split} split"):
        variant_windows(TokenShards(tokens, split), settings)


def test_the_base_encoder_is_the_mean_of_the_last_hidden_states(base):
    from transformers import AutoModelForCausalLM

    encoder = load_encoder(BASE, base, None, "cpu")
    ids = torch.randint(VOCABULARY, (3, SEQ_LEN))
    with torch.no_grad():
        output = AutoModelForCausalLM.from_pretrained(base)(ids, output_hidden_states=True)
    found = encoder.encode(ids)
    assert found.dtype == torch.float32
    assert found.shape == (3, encoder.embedding_size) == (3, WIDTH)
    torch.testing.assert_close(found, output.hidden_states[-1].mean(1), rtol=1e-5, atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.fixture(scope="module")
def bidirectional_encoder(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, for which it matters where a text begins and what comes after it; without a pooler, as many are."""
    from transformers import BertConfig, BertModel

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
    from transformers import AutoModel, AutoTokenizer

    text_encoder = request.getfixturevalue(source)
    folder = changed_copy(
        text_encoder, tmp_path / "copy", "tokenizer_config.json", padding_side=side, pad_token=pad
    )  # fmt: skip
    together = load_hub(folder, tokens).encode_texts(UNEVEN)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == side
    for text, found in zip(UNEVEN, together, strict=True):
        with torch.no_grad():
            states = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(found, states[0].mean(0), rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == len(UNEVEN)


def test_a_text_encoder_reads_the_text_of_the_window_with_its_own_tokenizer(text_encoder, tokens):
    encoder, corpus = load_hub(text_encoder, tokens), load_tokenizer(tokens / "tokenizer")
    text = TEXTS[0]
    ids = corpus.encode_batch([text])[0].tolist()
    assert len(ids) != len(encoder.tokenizer(text)["input_ids"])
    assert torch.equal(encoder.encode(torch.tensor([ids])), encoder.encode_texts([text]))
    assert encoder.embedding_size == WIDTH


@pytest.mark.parametrize("kind", ["base", "hub"])
def test_encoders_are_frozen(kind, base, text_encoder, tokens):
    encoder = load_encoder(BASE, base, None, "cpu") if kind == "base" else load_hub(text_encoder, tokens)
    before = copy.deepcopy(encoder.model.state_dict())
    assert not encoder.model.training
    vectors = encoder.encode(torch.randint(VOCABULARY, (4, SEQ_LEN)))
    predictor = torch.nn.Linear(WIDTH, 3)
    predictor(vectors).square().sum().backward()  # vectors are of use in training, and give nothing back
    assert predictor.weight.grad.abs().max() > 0
    for name, parameter in encoder.model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_base_encodes_in_the_dtype_it_was_saved_in(base, tmp_path):
    folder = changed_copy(base, tmp_path / "copy", "config.json", dtype="bfloat16")
    weights = {name: value.bfloat16() for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for path, dtype in ((base, torch.float32), (folder, torch.bfloat16)):
        encoder = load_encoder(BASE, path, None, "cpu")
        assert encoder.dtype == encoder.model.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_encoder_has_the_dtype_that_is_asked_for(text_encoder, tokens, dtype):
    encoder = load_encoder(hub(text_encoder), "nowhere", load_tokenizer(tokens / "tokenizer"), "cpu", dtype)
    assert encoder.dtype == encoder.model.dtype == dtype
    assert encoder.encode_texts(TEXTS[:1]).dtype == torch.float32


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def need_foreign_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('foreign code was run')\n")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ""),
        (lambda folder: (path := folder / "model.safetensors").write_bytes(path.read_bytes()[:-100]), ""),
        (
            lambda folder: edit_weights(folder, lambda weights: weights.pop("layers.1.mlp.up_proj.weight")),
            "its files lack 1 of the model's tensors, such as layers.1.mlp.up_proj.weight",
        ),
        (lambda folder: edit_weights(folder, lambda weights: weights.update({"norm.weight": torch.ones(1)})), ""),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ""),
        (need_foreign_code, ""),
    ],
)
def test_an_encoder_that_cannot_be_loaded_whole_and_safely_is_refused_in_one_line(
    damage, problem, text_encoder, tokens, tmp_path
):
    folder = changed_copy(text_encoder, tmp_path / "copy", "config.json")
    damage(folder)
    with pytest.raises(DynarouteError) as caught:
        load_hub(folder, tokens)
    message = str(caught.value)
    assert message.startswith(f"dagformer.encoder.path: {folder}: ")
    assert problem in message
    assert "\n" not in message


def test_a_missing_base_says_which_stage_makes_it(tmp_path):
    with pytest.raises(DynarouteError, match=r"no base model: run the stage prepare_base"):
        load_encoder(BASE, tmp_path, None, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(base):
    with pytest.raises(DynarouteError, match="device = 'cuda'"):
        load_encoder(BASE, base, None, "cuda")


def test_a_tokenizer_without_anything_to_pad_with_is_refused(text_encoder, tokens, tmp_path):
    folder = changed_copy(text_encoder, tmp_path / "copy", "tokenizer_config.json", eos_token=None)
    with pytest.raises(DynarouteError, match="neither pad_token nor eos_token"):
        load_hub(folder, tokens)


@pytest.mark.parametrize(
    ("file", "change"), [("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")]
)
def test_a_text_that_is_too_long_for_the_encoder_is_an_error_and_not_cut(text_encoder, tokens, tmp_path, file, change):
    folder = changed_copy(text_encoder, tmp_path / "copy", file, **{change: 6})
    encoder = load_hub(folder, tokens)
    encoder.encode_texts(["cat"])
    with pytest.raises(DynarouteError, match=r"reads at most 6 tokens, but a window has \d+ of them: lower"):
        encoder.encode_texts(["cat", TEXTS[0]])


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
def test_an_encoder_of_any_family_reads_as_many_tokens_as_it_has_positions(
    text_encoder, tokens, tmp_path, kind, sizes, limit
):
    import transformers

    torch.manual_seed(3)
    sizes = {
        key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    } | sizes
    length = {"model_max_length": 12 if kind in ("XLNet", "T5") else None}
    folder = changed_copy(text_encoder, tmp_path / "copy", "tokenizer_config.json", **length)
    config = getattr(transformers, f"{kind}Config")(intermediate_size=24, **sizes)
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


def test_a_model_that_encodes_no_text_is_refused_in_one_line(text_encoder, tokens, tmp_path):
    from transformers import ViTConfig, ViTModel

    folder = changed_copy(text_encoder, tmp_path / "copy", "tokenizer_config.json")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(folder)
    with pytest.raises(DynarouteError, match=r"^dagformer\.encoder\.path: .*copy: does not encode text: [^\n]+$"):
        load_hub(folder, tokens)


def test_a_text_without_tokens_is_an_error_and_not_a_nan(text_encoder, tokens):
    with pytest.raises(DynarouteError, match="finds no token in ''"):
        load_hub(text_encoder, tokens).encode_texts(["cat", ""])


@pytest.mark.parametrize("kind", ["base", "hub"])
def test_written_embeddings_are_those_of_the_windows_and_their_prefixes(
    kind, base, text_encoder, tokens, windows, tmp_path
):
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
    assert {name: (own["windows"], own["tokens_read"]) for name, own in metadata["files"].items()} == {
        "train": (7, SEQ_LEN), "validation": (2, SEQ_LEN), "test": (5, SEQ_LEN),
        "train_prefix": (7, PREFIX), "validation_prefix": (2, PREFIX), "test_prefix": (5, PREFIX),
    }  # fmt: skip


def test_the_encoder_reads_nothing_of_a_window_beyond_its_prefix(base, windows, tmp_path):
    """Or the prefix protocol would be scored on tokens that the encoder has seen."""
    encoder, seen = load_encoder(BASE, base, None, "cpu"), []
    encode = encoder.encode
    encoder.encode = lambda tokens: seen.append(tuple(tokens.shape)) or encode(tokens)
    write(encoder, BASE, windows, tmp_path / "embeddings")
    assert seen == [(7, SEQ_LEN), (2, SEQ_LEN), (5, SEQ_LEN), (7, PREFIX), (2, PREFIX), (5, PREFIX)]


def test_two_runs_write_the_same_bytes_and_small_batches_the_same_vectors(base, windows, tmp_path, monkeypatch):
    for name in ("one", "two"):
        encoder = load_encoder(BASE, base, None, "cpu")
        write(encoder, BASE, windows, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    monkeypatch.setattr(embeddings, "BATCH_TOKENS", 2 * SEQ_LEN)
    write(encoder, BASE, windows, tmp_path / "small")
    one, small = load_embeddings(tmp_path / "one"), load_embeddings(tmp_path / "small")
    for name in one:
        np.testing.assert_allclose(small[name], one[name], rtol=1e-4, atol=1e-5)


def test_numbers_that_are_not_finite_stop_the_stage_and_leave_nothing(base, windows, tmp_path):
    encoder = load_encoder(BASE, base, None, "cpu")
    encoder.model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(DynarouteError, match="not finite for windows 0 to 6"):
        write(encoder, BASE, windows, tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


@pytest.mark.parametrize("crash_at", [0, 1, 2, 3, 5, 7, 8, 9])
def test_a_run_that_died_anywhere_ends_as_one_that_did_not_and_does_little_twice(
    base, windows, tmp_path, monkeypatch, crash_at
):
    monkeypatch.setattr(embeddings, "BATCH_TOKENS", 2 * SEQ_LEN)
    monkeypatch.setattr(embeddings, "NOTE_WINDOWS", 4)
    encoder, encoded = load_encoder(BASE, base, None, "cpu"), []
    encode = encoder.encode
    encoder.encode = lambda tokens: encoded.append(tokens) or encode(tokens)
    write(encoder, BASE, windows, tmp_path / "whole")
    batches = len(encoded)
    encoded.clear()
    with killed_at(encoder, "encode", crash_at):
        write(encoder, BASE, windows, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    write(encoder, BASE, windows, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert len(encoded) <= batches + 1  # of what was not noted yet
    assert not (tmp_path / "scratch").exists()


def test_a_run_killed_while_it_publishes_encodes_nothing_again(base, windows, tmp_path):
    encoder = load_encoder(BASE, base, None, "cpu")
    write(encoder, BASE, windows, tmp_path / "whole")
    with killed_at(artifacts, "_replace"):
        write(encoder, BASE, windows, tmp_path / "resumed")
    encoder.encode = lambda _: pytest.fail("a window is encoded once more")
    write(encoder, BASE, windows, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_two_kills_that_leave_a_note_without_its_vectors_do_not_stop_the_third_run(base, windows, tmp_path):
    encoder = load_encoder(BASE, base, None, "cpu")
    write(encoder, BASE, windows, tmp_path / "whole")
    for step in ("discard", "_write_vectors"):  # once it has published, and then at the start
        with killed_at(embeddings, step):
            write(encoder, BASE, windows, tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)  # as DVC does before it runs the stage again
    write(encoder, BASE, windows, tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.fixture
def written(base, windows, tmp_path) -> Path:
    write(load_encoder(BASE, base, None, "cpu"), BASE, windows, tmp_path / "embeddings")
    return tmp_path / "embeddings"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "test.npy", 200), "test.npy: missing or damaged"),
        (lambda folder: (folder / "test.npy").unlink(), "test.npy: missing or damaged"),
        (lambda folder: np.save(folder / "test.npy", np.zeros((5, WIDTH))), "test.npy: float64"),
        (lambda folder: np.save(folder / "test.npy", np.zeros((4, WIDTH), "f4")), "says float32 (5, 16)"),
        (lambda folder: (folder / "metadata.json").write_text("{}"), "metadata.json: lacks 'embedding_size'"),
        (lambda folder: (folder / "metadata.json").write_text("[]"), "metadata.json: must be a mapping"),
        (lambda folder: (folder / "metadata.json").unlink(), "metadata.json: cannot be read"),
    ],
)
def test_damaged_embeddings_are_refused_naming_the_file(written, damage, message):
    load_embeddings(written)
    damage(written)
    with pytest.raises(DynarouteError) as caught:
        load_embeddings(written)
    assert message in str(caught.value)
    assert str(written) in str(caught.value)


def test_loaded_embeddings_can_be_written_to_without_changing_the_file(written):
    before = (written / "train.npy").read_bytes()
    torch.from_numpy(load_embeddings(written)["train"]).zero_()
    assert (written / "train.npy").read_bytes() == before


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
    path = Path("encoder/tokenizer_config.json")
    path.write_text(path.read_text() + " ")
    encode_windows.main(settings, "training")
    assert scratch[0] == scratch[1] != scratch[2]


def test_the_stage_encodes_the_windows_that_the_settings_ask_for(stage_settings, base, tokens):
    settings = stage_settings
    for part in PARTS["foreach"]:
        encode_windows.main(settings, part)
    found = load_embeddings("data/dagformer/embeddings/training")
    assert {name: len(vectors) for name, vectors in found.items()} == {"train": 4, "validation": 1}
    held_out = load_embeddings("data/dagformer/embeddings/evaluation")
    assert {name: len(vectors) for name, vectors in held_out.items()} == {"test": 2, "test_prefix": 2}
    drawn = domain_windows(TokenShards(tokens, "test"), SEQ_LEN, settings.analysis.domain_windows)
    domains = load_embeddings("data/dagformer/embeddings/domains")
    assert {name: len(vectors) for name, vectors in domains.items()} == (
        {} if drawn is None else {"domains": len(drawn.windows)}
    )
    train = evenly_spaced(Windows(TokenShards(tokens, "train"), SEQ_LEN, keep_tail=False), 4, "train")
    expected = load_encoder(BASE, base, None, "cpu").encode(train.batch(range(4))[0])
    assert torch.equal(torch.from_numpy(found["train"]), expected)
