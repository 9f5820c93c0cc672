"""Export and benchmark as stages: what they write, that it repeats, and that a wrong logit stops them."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from small_store import RUN, export, make_model, uniform_load

from dynaroute.artifacts import write_csv, write_json
from dynaroute.config import Settings, load_settings
from dynaroute.data.shards import TokenShards
from dynaroute.data.tokenization import tokenize
from dynaroute.dwr import benchmark
from dynaroute.dwr.benchmark import Cell, peak_memory, sweep
from dynaroute.dwr.experts import CacheStatistics
from dynaroute.errors import DynarouteError
from dynaroute.training.checkpoints import save_checkpoint

REPOSITORY = Path(__file__).parents[2]
EXACT = ["reports/dwr/cache.csv", "reports/dwr/cache.json", "reports/dwr/export.json"]


def stage(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"stages/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_settings(**benchmark_cache) -> Settings:
    settings = load_settings(REPOSITORY / "params.yaml")
    sizes = {"capacities": [1, 3, 10], "num_prompts": 2, "prompt_tokens": 6, "new_tokens": 5, "repeats": 2}
    changed = settings.benchmark_cache.model_copy(update={**sizes, **benchmark_cache})
    return settings.model_copy(update={"benchmark_cache": changed, "num_threads": torch.get_num_threads()})


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The working directory, with tokens of a small corpus and the output of a training."""
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings()
    corpus = settings.dwr.corpus
    words = ["cat", "sat", "mat", "on", "the", "a", "dog", "and"]
    raw = Path("data/raw") / corpus
    raw.mkdir(parents=True)
    metadata = {"splits": {}}
    for number, split in enumerate(("train", "validation", "test")):
        text = " ".join(words[(index * index + number) % len(words)] for index in range(200))
        document = {"id": split, "text": text, "source": "here"}
        (raw / f"{split}.jsonl").write_text(json.dumps(document) + "\n")
        metadata["splits"][split] = {"documents": 1, "characters": len(text), "sources": {"here": 1}}
    write_json(raw / "metadata.json", metadata)
    tokenizer = settings.corpus(corpus).tokenizer.model_copy(update={"vocab_size": 260})
    tokenize(corpus, tokenizer, raw, Path("data/tokens") / corpus)

    model = make_model(vocab_size=TokenShards(Path("data/tokens") / corpus, "test").padded_vocab_size)
    save_checkpoint("data/dwr/train/best.safetensors", model.state_dict(), {"step": 3, "validation_loss": 1.5})
    write_json("data/dwr/train/run.json", {"run": RUN, "config": model.config.model_dump()})
    rows = [
        {"layer": layer, "expert": expert, "load": load}
        for layer, loads in enumerate(uniform_load(model))
        for expert, load in enumerate(loads)
    ]
    write_csv("reports/dwr/router.csv", rows)
    return tmp_path


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is measured in fresh processes, which take seconds to start."""
    memory = benchmark.Memory(4, 3, 1, 0)
    module = stage("benchmark_cache")
    monkeypatch.setattr(
        module, "peak_memory", lambda _, __, ___, sizes: {Cell(size): memory for size in (None, *sizes)}
    )
    return module


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_stages_write_the_same_results_on_every_run(trained, no_processes):
    contents = []
    for _ in range(2):
        stage("export_experts").main(tiny_settings())
        no_processes.main(tiny_settings())
        contents.append([Path(name).read_bytes() for name in (*EXACT, "data/dwr/expert_store/manifest.json")])
    assert contents[0] == contents[1]

    exported = json.loads(Path("reports/dwr/export.json").read_text())
    assert exported["run"] == RUN
    assert exported["expert_files"] == 10
    assert len(exported["checks"]) == 4
    assert all(exported["checks"].values())
    summary = json.loads(Path("reports/dwr/cache.json").read_text())
    assert summary["capacity_nearest_a_third"] == 3
    assert all(summary["checks"].values())
    timing = json.loads(Path("reports/dwr/cache_timing.json").read_text())
    assert timing["checks"] == {"no_more_experts_are_in_memory_than_the_capacity": True}

    rows = rows_of("reports/dwr/cache.csv")
    assert [(row["capacity"], row["warm_start"]) for row in rows] == [
        (capacity, warm) for capacity in ("1", "3", "10") for warm in ("False", "True")
    ]
    held = rows[-1]  # everything, from the start
    assert (held["prefill_hit_rate"], held["decode_hit_rate"], held["evictions"]) == ("1.0", "1.0", "0")
    assert {row["decode_requests"] for row in rows} == {str(2 * 5 * 2 * 2)}  # prompts, steps, layers, top_k
    timed = rows_of("reports/dwr/cache_timing.csv")
    assert len(timed) == 1 + len(rows)
    assert timed[0]["capacity"] == ""
    assert timed[0]["ratio_to_resident"] == "1.0"


def test_a_logit_that_differs_stops_the_benchmark(trained, no_processes, monkeypatch):
    stage("export_experts").main(tiny_settings())
    load_resident = benchmark.load_resident

    def off_by_one_bit(store):
        model = load_resident(store)
        model.output.weight.view(torch.int32)[7, 0] ^= 1
        return model

    monkeypatch.setattr(benchmark, "load_resident", off_by_one_bit)
    with pytest.raises(DynarouteError, match=r"capacity=1, .*logits of prompt 0 are not those of the resident model"):
        no_processes.main(tiny_settings())
    assert not Path("reports/dwr/cache.csv").exists()


def test_a_store_that_is_not_the_model_stops_the_export(trained, monkeypatch):
    module = stage("export_experts")
    write = module.export_store

    def export_another(model, run, load, path):
        write(make_model(seed=9, vocab_size=model.config.vocab_size), run, load, path)

    monkeypatch.setattr(module, "export_store", export_another)
    with pytest.raises(DynarouteError, match="failed: reassembled_weights"):
        module.main(tiny_settings())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"capacities": [1, 11]}, "capacities = .*10 experts in all"),
        ({"num_prompts": 10**6}, "num_prompts = 1000000: the test split .* has"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_text_are_refused(trained, no_processes, changes, named):
    stage("export_experts").main(tiny_settings())
    with pytest.raises(DynarouteError, match=f"params.yaml: benchmark_cache.{named}"):
        no_processes.main(tiny_settings(**changes))


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("data/dwr/train/run.json", "{}", "run.json: damaged: 'config'"),
        ("data/dwr/train/run.json", '{"run": "r", "config": {"d_model": 3}}', "run.json: damaged"),
        ("data/dwr/train/best.safetensors", "junk", "best.safetensors: not a readable checkpoint"),
        ("reports/dwr/router.csv", "layer,expert,load\n0,0,0.5\n", r"router.csv: no load of \(0, 1\)"),
        ("reports/dwr/router.csv", "layer,expert\n0,0\n", "router.csv: no load of 'load'"),
        ("reports/dwr/router.csv", None, "router.csv: cannot be read"),
    ],
)
def test_a_damaged_training_is_refused_and_nothing_exported(trained, path, content, named):
    Path(path).unlink() if content is None else Path(path).write_text(content)
    with pytest.raises(DynarouteError, match=named):
        stage("export_experts").main(tiny_settings())
    assert not Path("data/dwr/expert_store").exists()


def test_a_sweep_counts_prefill_and_decode_apart(tmp_path):
    model = make_model()
    store = export(tmp_path / "store", model)
    prompts = torch.arange(14).view(2, 7)
    passes = sweep(store, prompts, 4, [10], repeats=1)
    assert list(passes) == [Cell(), Cell(10), Cell(10, True)]
    (resident,), (cold,), (warm,) = passes.values()
    assert resident.prefill == resident.decode == CacheStatistics()
    assert all(len(seconds) == 2 for seconds in (resident.prefill_seconds, cold.decode_seconds, warm.decode_seconds))
    assert cold.prefill.hits == 0
    assert cold.decode.requests == warm.decode.requests == 2 * 4 * 2 * 2
    assert warm.prefill.misses == warm.decode.misses == 0
    assert warm.warm_start_bytes == 2 * 10 * store.expert_bytes
    assert cold.warm_start_bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the kinds of memory apart")
def test_evicted_experts_leave_memory(tmp_path):
    model = make_model(d_model=128, d_ff=1024, num_experts=8)  # 1 MiB an expert, 16 MiB in all
    store = export(tmp_path / "store", model)
    pages = store.expert_bytes + 2 * 4096
    memory = peak_memory(store.path, torch.arange(16).view(1, 16), 8, [2, 16])
    assert memory[Cell()].mapped_experts == 0
    assert store.expert_bytes < memory[Cell(2)].mapped_experts <= 2 * pages
    assert 2 * pages < memory[Cell(16)].mapped_experts <= 16 * pages
    saved = memory[Cell()].anonymous - memory[Cell(2)].anonymous
    assert saved > 12 * store.expert_bytes  # of 16
