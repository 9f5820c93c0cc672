"""The generation command: what it prints, and what it refuses."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_moe import save_moe
from small_store import make_model, uniform_usage

from dynaroute.config.data import ByteBPE
from dynaroute.data.tokens.tokenizers import save_tokenizer
from dynaroute.dwr import generate
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.store import export_store

PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    words = "the cat sat on a mat and the dog ate it " * 30
    tokenizer = save_tokenizer(ByteBPE(kind="bpe", vocab_size=270), [words], folder / "tokenizer")
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=48)
    with torch.no_grad():
        model.output.weight[tokenizer.eot_id] = -10  # so that the text continues
    export_store(model, "run", uniform_usage(model), folder / "store", tokenizer=folder / "tokenizer")
    return folder / "store"


def run(monkeypatch, capsys, store, *arguments, prompt=PROMPT):
    monkeypatch.setattr(sys, "argv", ["generate", "--store", str(store), "--prompt", prompt, *arguments])
    generate.main()
    return capsys.readouterr()


@pytest.mark.parametrize("choice", [[], ["--temperature", "1.5", "--top-p", "0.95", "--seed", "3"]])
def test_text_is_the_same_with_every_cache(monkeypatch, capsys, store, choice):
    resident = run(monkeypatch, capsys, store, "--tokens", "20", *choice)
    assert len(resident.out) > 10
    assert "all experts resident" in resident.err
    for arguments in (
        ["--cache", "1"],
        ["--cache", "4", "--policy", "next_use", "--prefetch", "gate"],
        ["--cache", "5", "--per-layer", "--policy", "lfu", "--prefetch", "transition", "--lookahead", "3"],
        ["--cache", "10", "--policy", "pinned", "--prefetch", "frequency"],
    ):
        assert run(monkeypatch, capsys, store, "--tokens", "20", *choice, *arguments).out == resident.out


@pytest.mark.parametrize("choice", [[], ["--temperature", "100"]])
def test_padding_of_the_vocabulary_never_comes(monkeypatch, capsys, store, tmp_path, choice):
    model = make_model(vocab_size=320, max_seq_len=48)  # 270, padded
    with torch.no_grad():
        model.output.weight[270:] *= 100
    export_store(model, "run", uniform_usage(model), tmp_path / "store", tokenizer=store / "tokenizer")
    ids = []
    monkeypatch.setattr(generate, "stream", lambda text, tokens, output: ids.extend(tokens))
    run(monkeypatch, capsys, tmp_path / "store", *choice)
    assert len(ids) > 30
    assert max(ids) < 270


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(monkeypatch, capsys, store, tmp_path):
    model = make_model(vocab_size=269, max_seq_len=48)
    export_store(model, "run", uniform_usage(model), tmp_path / "store", tokenizer=store / "tokenizer")
    with pytest.raises(SystemExit, match=r"store/tokenizer: has 270 tokens, but the model has 269$"):
        run(monkeypatch, capsys, tmp_path / "store")


def test_sampling_follows_its_seed(monkeypatch, capsys, store):
    arguments = ["--temperature", "1.5", "--top-p", "0.95", "--cache", "4"]
    texts = [run(monkeypatch, capsys, store, *arguments, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_it_stops_where_the_positions_end(monkeypatch, capsys, store):
    assert 30 < int(run(monkeypatch, capsys, store, "--tokens", str(10**30)).err.split()[0]) < 48


@pytest.mark.parametrize("choice", [["--temperature", "1e-6"], ["--temperature", "1e6", "--top-p", "1e-320"]])
def test_extreme_values_that_are_allowed_sample_the_most_probable_token(monkeypatch, capsys, store, choice):
    greedy = run(monkeypatch, capsys, store).out
    assert run(monkeypatch, capsys, store, *choice, "--seed", str(2**63 - 1)).out == greedy


def test_a_prompt_that_is_no_unicode_text_is_repaired(monkeypatch, capsys, store):
    expected = run(monkeypatch, capsys, store, prompt="the cat \N{REPLACEMENT CHARACTER} sat \U0001f600").out
    for broken in ("the cat \ud800 sat \ud83d\ude00", "the cat \udcff sat \U0001f600"):
        assert run(monkeypatch, capsys, store, prompt=broken).out == expected


def test_a_reader_that_closes_the_pipe_ends_generation_quietly(store):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dynaroute.dwr.generate", "--store", store, "--prompt", b"not UTF-8: \xe9"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


COMPARISON = r"preferred by ([\d.]+); KL to exact routing (\S+) nats .* (\S+), exact (\S+), over (\d+) tokens\n$"


def test_cache_aware_routing_says_that_it_is_inexact_and_by_how_much(monkeypatch, capsys, store):
    sampled = ["--temperature", "1.5", "--seed", "3", "--cache", "4"]  # greedy text repeats itself
    exact = run(monkeypatch, capsys, store, *sampled, "--cache-aware", "0")
    assert "inexact" not in exact.err
    assert exact.out == run(monkeypatch, capsys, store, *sampled).out
    found = run(monkeypatch, capsys, store, *sampled, "--cache-aware", "4")
    alpha, kl, perplexity, exactly, tokens = map(float, re.search(COMPARISON, found.err).groups())
    assert (alpha, tokens) == (4, int(found.err.split()[0]))
    assert kl > 0.01
    assert perplexity != exactly
    assert found.out != exact.out
    hits = [float(re.search(r"hit rate ([\d.]+)", line)[1]) for line in (found.err, exact.err)]
    assert hits[0] > hits[1]
    assert found.out == run(monkeypatch, capsys, store, *sampled, "--cache-aware", "4").out


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_budget_in_bytes_gives_the_same_text(monkeypatch, capsys, store, tmp_path, precision):
    model = make_model(vocab_size=270, max_seq_len=48)
    export_store(model, "run", uniform_usage(model), tmp_path / "store", precision, store / "tokenizer")
    resident = run(monkeypatch, capsys, tmp_path / "store")
    found = run(monkeypatch, capsys, tmp_path / "store", "--memory", "90KB", "--prefetch", "gate")
    assert found.out == resident.out
    assert 0.1 < float(re.search(r"hit rate ([\d.]+)", found.err)[1]) < 0.99


# --- a model of transformers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe(tmp_path_factory, store) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    save_moe(folder, "qwen2_moe", torch.bfloat16, "40KB", vocab_size=272)
    shutil.copytree(store / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}cat {{ turn.content }} sat{% endfor %}")
    return folder


def serve(monkeypatch, capsys, moe, *arguments, text="", prompt=("--prompt", PROMPT)):
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(moe), *prompt, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    generate.main()
    return capsys.readouterr()


def test_a_checkpoint_gives_the_same_text_in_any_memory(monkeypatch, capsys, moe, tmp_path):
    whole = serve(monkeypatch, capsys, moe, "--save-usage", str(tmp_path / "usage"))
    assert re.search(r"^64 tokens in .* the first after [\d.]+ s; hit rate 0\.\d+ of \d+ requests; ", whole.err)
    for arguments in (
        ["--memory", "9.3KB"],  # one expert
        ["--memory", "40 KiB", "--policy", "next_use", "--prefetch", "gate"],
        ["--cache", "5", "--per-layer", "--usage", str(tmp_path / "usage"), "--policy", "pinned"],
        ["--memory", "1TiB", "--usage", str(tmp_path / "usage"), "--prefetch", "transition"],
    ):
        assert serve(monkeypatch, capsys, moe, *arguments).out == whole.out


def test_a_checkpoint_says_so_too_and_a_profile_counts_what_was_used_once(monkeypatch, capsys, moe, tmp_path):
    arguments = ["--cache", "5", "--cache-aware", "3", "--save-usage", str(tmp_path / "usage")]
    found = serve(monkeypatch, capsys, moe, *arguments, "--tokens", "20")
    _, kl, perplexity, exactly, tokens = map(float, re.search(COMPARISON, found.err).groups())
    assert (kl > 0, perplexity != exactly, tokens) == (True, True, 20)
    load = json.loads((tmp_path / "usage").read_text())["usage"]["load"]
    exact = serve(monkeypatch, capsys, moe, *arguments[:2], *arguments[4:], "--tokens", "20")
    assert "inexact" not in exact.err
    again = json.loads((tmp_path / "usage").read_text())["usage"]["load"]
    assert [sum(layer) for layer in load] == [sum(layer) for layer in again]
    assert load != again


def test_a_profile_is_kept_on_top_of_an_earlier_one(monkeypatch, capsys, moe, tmp_path):
    loads = []
    for _ in range(2):
        again = ["--usage", str(tmp_path / "usage")] if loads else []
        serve(monkeypatch, capsys, moe, "--save-usage", str(tmp_path / "usage"), *again)
        loads.append(json.loads((tmp_path / "usage").read_text())["usage"]["load"])
    assert loads[1] == [[2 * tokens for tokens in layer] for layer in loads[0]]


def test_prompts_of_a_file_share_a_warm_cache(monkeypatch, capsys, moe, tmp_path):
    alone = serve(monkeypatch, capsys, moe)
    (tmp_path / "prompts").write_text(f"{PROMPT}\n\n{PROMPT}\n")
    both = serve(monkeypatch, capsys, moe, prompt=("--prompts", str(tmp_path / "prompts")))
    assert both.out == 2 * alone.out
    first, second = both.err.splitlines()
    assert "; 0.0 MiB read;" not in first
    assert "hit rate 1.000" in second
    assert "; 0.0 MiB read;" in second


def test_a_profile_is_kept_when_a_later_prompt_is_refused(monkeypatch, capsys, moe, tmp_path):
    serve(monkeypatch, capsys, moe, "--save-usage", str(tmp_path / "one"))
    (tmp_path / "prompts").write_text(f"{PROMPT}\n{PROMPT * 60}\n")
    prompts = "--prompts", str(tmp_path / "prompts")
    with pytest.raises(SystemExit, match=r"--prompt: \d+ tokens; the model has 128 positions"):
        serve(monkeypatch, capsys, moe, "--save-usage", str(tmp_path / "two"), prompt=prompts)
    assert (tmp_path / "two").read_text() == (tmp_path / "one").read_text()


def test_a_line_of_prompts_ends_only_at_a_newline(monkeypatch, capsys, moe, tmp_path):
    (tmp_path / "prompts").write_bytes("the cat\u2028sat\x0con\r\n\na mat".encode())
    found = serve(monkeypatch, capsys, moe, "--tokens", "1", prompt=("--prompts", str(tmp_path / "prompts")))
    assert len(found.err.splitlines()) == 2


def test_interactive_prompts_go_on_after_one_that_is_too_long(monkeypatch, capsys, moe):
    alone = serve(monkeypatch, capsys, moe)
    found = serve(monkeypatch, capsys, moe, text=f"{PROMPT * 60}\n{PROMPT}\n", prompt=("--interactive",))
    assert found.out == alone.out
    assert re.match(r"generate: --prompt: \d+ tokens; the model has 128 positions\n64 tokens in", found.err)


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("when", ["before", "after"])
def test_interactive_prompts_go_on_after_ctrl_c_within_the_cache(monkeypatch, capsys, moe, call, when):
    alone, calls, assign = serve(monkeypatch, capsys, moe), [], ExpertCache._assign

    def interrupted(cache, load):
        calls.append(load)
        if len(calls) == call and when == "before":
            raise KeyboardInterrupt
        slot = assign(cache, load)
        if len(calls) == call:
            raise KeyboardInterrupt
        return slot

    monkeypatch.setattr(ExpertCache, "_assign", interrupted)
    arguments = ["--cache", "4", "--prefetch", "gate"]
    found = serve(monkeypatch, capsys, moe, *arguments, text=f"{PROMPT}\n{PROMPT}\n", prompt=("--interactive",))
    assert found.out.endswith(alone.out)
    assert len(calls) > call


def test_the_status_is_that_of_the_last_prompt(monkeypatch, capsys, moe):
    interrupting = iter([True])

    def stream(*arguments):
        if next(interrupting, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream", stream)
    for later in (PROMPT * 60, PROMPT):
        interrupting = iter([True])
        serve(monkeypatch, capsys, moe, text=f"{PROMPT}\n{later}\n", prompt=("--interactive",))
    interrupting = iter([True])
    with pytest.raises(SystemExit) as caught:
        serve(monkeypatch, capsys, moe, text=f"{PROMPT}\n", prompt=("--interactive",))
    assert caught.value.code == 130


def test_a_chat_uses_the_models_template(monkeypatch, capsys, moe):
    plain = serve(monkeypatch, capsys, moe, prompt=("--prompt", f"cat {PROMPT} sat"))
    assert serve(monkeypatch, capsys, moe, "--chat").out == plain.out


def test_a_stop_token_ends_the_text(monkeypatch, capsys, moe, tmp_path):
    ids = []
    with monkeypatch.context() as patch:
        patch.setattr(generate, "stream", lambda text, tokens, output: ids.extend(tokens))
        serve(monkeypatch, capsys, moe)
    shutil.copytree(moe, tmp_path / "moe")
    stop = ids[5]
    (tmp_path / "moe" / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 271]}))
    assert serve(monkeypatch, capsys, tmp_path / "moe").err.startswith(f"{ids.index(stop)} tokens in")
    assert max(ids) < 270  # the vocabulary is padded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "0"], "capacity = 0: an expert cache must hold at least 1 expert"),
        (["--cache", "11"], "--cache 11: the model has 10 experts in all"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0 and at most 1"),
        (["--temperature", "-1"], "--temperature -1.0: must be 0, or 1e-06 to 1e"),
        (["--temperature", "1e-40"], "--temperature 1e-40: must be 0, or 1e-06 to 1e"),
        (["--temperature", "inf"], "--temperature inf: must be 0, or"),
        (["--temperature", "nan"], "--temperature nan: must be 0, or"),
        (["--top-p", "0"], "--top-p 0.0: must be above 0"),
        (["--top-p", "nan"], "--top-p nan: must be above 0"),
        (["--seed", "12345678901234567890"], "--seed 12345678901234567890: must be 0 to 9223372036854775807"),
        (["--seed", "-1"], "--seed -1: must be 0 to"),
        (["--threads", "100000"], "--threads 100000: must be 1 to 1024"),
        (["--tokens", "0"], "--tokens 0: must be positive"),
        (["--lookahead", "0"], "--lookahead 0: must be positive"),
        (["--cache", "2", "--prefetch", "gate", "--lookahead", "9"], "--lookahead 9: must be 1 to 5"),
        (["--policy", "lru"], "--policy: needs --cache N or --memory SIZE"),
        (["--prefetch", "gate"], "--prefetch: needs --cache N"),
        (["--per-layer"], "--per-layer: needs --cache N"),
        (["--lookahead", "2"], "--lookahead: needs --cache N"),
        (["--cache-aware", "1"], "--cache-aware: needs --cache N"),
        (["--cache", "2", "--cache-aware", "-1"], "--cache-aware -1.0: must be 0, which is exact, to 1e"),
        (["--cache", "2", "--cache-aware", "nan"], "--cache-aware nan: must be 0, which is exact, to 1e"),
        (["--cache", "2", "--lookahead", "2"], "--lookahead: needs --prefetch frequency"),
        (["--prompt", PROMPT * 30], r"--prompt: \d+ tokens; the model has 48 positions"),
        (["--store", "nowhere"], "nowhere/manifest.json: cannot be read"),
        (["--memory", "4"], "--memory 4: must be a number with a unit: B, KB"),
        (["--memory", "20KB"], "--memory 20KB: must be at least 45KiB, for experts: 1"),
        (["--chat"], "--chat: .* has no chat template"),
        (["--revision", "main"], "--revision main: .* is a local folder"),
    ],
)
def test_a_mistake_ends_it_with_one_line(monkeypatch, capsys, store, arguments, message):
    with pytest.raises(SystemExit, match=f"^generate: {message}") as caught:
        run(monkeypatch, capsys, store, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "summed_up"),
    [
        ([], r"\d+ tokens in .* all experts resident"),
        (
            ["--cache", "3", "--prefetch", "gate"],
            r"\d+ tokens in .* of \d+ requests, .* late; .* MiB read.* for experts",
        ),
    ],
)
def test_ctrl_c_sums_up_what_was_done_and_ends_threads(store, arguments, summed_up):
    """The signal comes with the eighth token, which is not done then; the process can only end if its threads do."""
    script = f"""
import os, signal, sys
from dynaroute.dwr import generate
sample = generate.sample
def interrupted(*arguments):
    for number, token in enumerate(sample(*arguments)):
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)
        yield token
generate.sample = interrupted
sys.argv = ["generate", "--store", {str(store)!r}, "--prompt", {PROMPT!r}, *{arguments!r}]
generate.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert re.fullmatch(summed_up + "\n", done.stderr)
    assert done.stderr.startswith("7 tokens in")
    assert done.stdout.endswith("\n")


def test_it_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "--help"])
    generate.main()
    assert "python -m dynaroute.dwr.generate --store data/dwr/expert_store" in capsys.readouterr().out
