"""`make scale NAME=gpu` on a CPU with small sizes."""

from pathlib import Path

import benchmark_dag
import benchmark_dagformer_step
import benchmark_gpu_cache
import benchmark_moe
import export_experts
import pytest
import torch
import train_dwr
from repository import REPOSITORY
from ruamel.yaml import YAML
from small_tokens import write_tokens

from dynaroute.config import Settings, load_settings
from dynaroute.dwr.model import DWRConfig
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_text
from dynaroute.reporting.inputs import read_csv

PARAMS = REPOSITORY / "params/gpu.yaml"
SMALL = {
    "dwr": {"d_model": 32, "d_ff": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4, "max_seq_len": 16},
    "dwr.training": {"epochs": 4, "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 2, "lr": 1e-2},
    "export_experts": {"calibration_windows": 2},
    "benchmark_cache": {
        "capacities": [2, 3, 8], "policies": ["lru"], "prefetchers": ["none", "gate"], "num_prompts": 1,
        "prompt_tokens": 4, "new_tokens": 4,
    },
    "dagformer": {"seq_len": 8, "prefix_tokens": 4},
    "dagformer.base": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 3, "num_heads": 2},
}  # fmt: skip
MODULES = {
    benchmark_moe: {"D": 16, "F_EXPERT": 16, "E": 4, "GATED_WIDTH": 8, "TOKENS": (5,), "ROUNDS": 2, "WARM_UP": 0},
    benchmark_dag: {
        "SIZES": {"cpu": tuple(benchmark_dag.Size(L=3, H=2, D=16, B=batch, T=8, V=32) for batch in (1, 2))},
        "ROUNDS": 2,
        "copy_bandwidth": lambda device: 1e9,
    },
    benchmark_dagformer_step: {
        "VOCABULARY": 32,
        "ENCODER": {
            "vocab_size": 40, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        },
        "ROUNDS": 2,
    },
}  # fmt: skip


def small_settings() -> Settings:
    data = YAML(typ="safe", pure=True).load(PARAMS)
    for section, values in SMALL.items():
        at = data
        for part in section.split("."):
            at = at[part]
        at.update(values)
    own = {"device": "cpu", "num_threads": 1, "predictor_hidden": 8, "rank": 2}
    data["simulate_cache"]["capacities"] = [2]
    return Settings.model_validate(data | own)


def write_corpora() -> None:
    """Text whose next token is known, in the folders of both corpora, which share a tokenizer."""
    text = [[(3 * i + start) % 60 + 1 for i in range(100)] for start in range(12)]
    write_tokens(Path("data/tokens/text"), vocab_size=64, train=text[:8], validation=text[8:10], test=text[10:])
    write_tokens(Path("data/tokens/wikitext"), vocab_size=64, train=[[5, 4, 3, 2, 1] * 20])
    for name in ("text", "wikitext"):
        write_text(f"data/tokens/{name}/tokenizer/tokenizer.json", "{}")


def test_every_stage_runs_and_a_text_that_is_not_trained_on_is_not_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module, values in MODULES.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    write_corpora()
    for stage in (train_dwr, export_experts, *MODULES, benchmark_gpu_cache):
        stage.main(small_settings())
    last = read_csv("reports/dwr/training.csv", "validation_loss", "validation_wikitext_loss").iloc[-1]
    assert last["validation_loss"] < last["validation_wikitext_loss"]


def test_a_corpus_of_another_tokenizer_is_not_validated_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpora()
    write_text("data/tokens/wikitext/tokenizer/tokenizer.json", "[]")
    with pytest.raises(DynarouteError, match="also_validate_on = 'wikitext': its tokenizer is not that of text"):
        train_dwr.main(small_settings())
    assert not Path("reports").exists()


def test_the_settings_are_the_published_sizes():
    settings = load_settings(PARAMS)
    dwr = settings.dwr
    sizes = dwr.model_dump(include=set(DWRConfig.model_fields) - {"vocab_size"})
    assert DWRConfig(vocab_size=50304, **sizes).num_params() == 259_712_096
    training = dwr.training
    assert (training.batch_size, dwr.max_seq_len, training.epochs, training.precision) == (16, 512, 10, "bf16")
    assert settings.benchmark_cache.capacities[-1] == 96
    paper = load_settings(REPOSITORY / "params/paper.yaml")
    same = {"batch_size", "predictor_hidden", "rank", "cascade", "init_logit"}
    assert settings.dagformer.precision == paper.dagformer.precision == "bf16"
    assert settings.variant("P1").model_dump(include=same) == paper.variant("P1").model_dump(include=same)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("stage", [benchmark_gpu_cache, benchmark_dag, benchmark_dagformer_step, benchmark_moe])
def test_without_a_gpu_every_benchmark_ends_with_one_line(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DynarouteError, match="device = 'cuda': this machine shows no CUDA device"):
        stage.main(load_settings(PARAMS))
    assert not list(tmp_path.iterdir())
