"""Export and benchmark as stages: what they write, that it repeats, and that a wrong logit stops them."""

import csv
import json
import sys
from importlib import import_module as stage
from pathlib import Path

import pytest
import torch
from plain_lru import lru_hit_rate
from small_settings import changed, default_settings
from small_store import RUN, export, make_model, uniform_usage

from dynaroute.analysis import cache_benchmark as benchmark
from dynaroute.analysis.cache_benchmark import Cell, peak_memory, sweep
from dynaroute.analysis.traces import load_trace, uniform_trace
from dynaroute.config import Settings
from dynaroute.data.tokens.encode import tokenize
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.dwr.experts.residency import CacheStatistics
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_csv, write_json
from dynaroute.training.checkpoints import save_checkpoint

EXACT = [f"data/dwr/{name}/summary.json" for name in ("cache", "export", "simulation")]
EXACT += ["data/dwr/cache/cells.csv", "data/dwr/simulation/speed.csv", "reports/dwr/simulated_hits.csv"]
EXACT += ["data/dwr/trace/experts.npy", "data/dwr/expert_store/manifest.json"]
CELLS = [
    (capacity, policy, prefetch)
    for capacity in (1, 3, 10)
    for policy in ("lru", "lfu")
    for prefetch in ("none", "gate")
]


def tiny_settings(**benchmark_cache) -> Settings:
    sizes = {"capacities": [1, 3, 10], "num_prompts": 2, "prompt_tokens": 6, "new_tokens": 5, "repeats": 2}
    names = {"policies": ["lru", "lfu"], "prefetchers": ["none", "gate"]}
    return default_settings(
        benchmark_cache={**sizes, **names, "lookahead": 2, **benchmark_cache},
        simulate_cache={"capacities": [2, 3, 10], **names},
        trace_routing={"windows": 2},
    )


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
        for layer, loads in enumerate(uniform_usage(model).load)
        for expert, load in enumerate(loads)
    ]
    write_csv("reports/dwr/router.csv", rows)
    return tmp_path


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is measured in fresh processes, which take seconds to start."""
    memory = benchmark.Memory(4, 3, 1)
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
        for name in ("trace_routing", "simulate_cache"):
            stage(name).main(tiny_settings())
        no_processes.main(tiny_settings())
        contents.append([Path(name).read_bytes() for name in EXACT])
    assert contents[0] == contents[1]

    exported = json.loads(Path("data/dwr/export/summary.json").read_text())
    assert exported["run"] == RUN
    assert exported["expert_files"] == 10
    assert len(exported["checks"]) == 4
    assert all(exported["checks"].values())
    summary = json.loads(Path("data/dwr/cache/summary.json").read_text())
    assert summary["capacity_nearest_a_third"] == 3
    assert all(summary["checks"].values())
    timing = json.loads(Path("data/dwr/measured/cache/summary.json").read_text())
    assert timing["checks"] == {"no_more_experts_are_in_memory_than_the_capacity": True}

    rows = rows_of("data/dwr/cache/cells.csv")
    assert [(int(row["capacity"]), row["policy"], row["prefetch"]) for row in rows] == CELLS
    held = rows[-1]  # everything
    assert (held["evictions"], held["prefetch_evictions"]) == ("0", "0")
    assert int(held["misses"]) + int(held["prefetched"]) <= 10 * 2  # once for each text
    assert {row["decode_requests"] for row in rows} == {str(2 * 5 * 2 * 2)}  # prompts, steps, layers, top_k
    timed = rows_of("data/dwr/measured/cache/cells.csv")
    assert len(timed) == 1 + len(rows) + 2  # resident; with a cold page cache
    for row, decided in zip(timed[1:], rows, strict=False):
        read, ahead, useful, wasted = (
            float(row[f"bytes_{name}"]) / exported["expert_file_bytes"]
            for name in ("read", "read_ahead", "useful", "wasted")
        )
        assert useful + wasted == ahead
        if row["prefetch"] == "none":  # others follow what pays, where decisions are counted with all predictions
            assert ahead == int(decided["prefetched"]) == 0
            assert read == int(decided["misses"])
            assert row["hit_rate"] == decided["decode_hit_rate"]
    assert timed[0]["capacity"] == ""
    assert timed[0]["ratio_to_resident"] == "1.0"

    simulation = json.loads(Path("data/dwr/simulation/summary.json").read_text())
    assert simulation["checks"] == {"no_policy_beats_min": True}
    assert set(simulation["hit_rate"]) == {"lru", "lfu", "min"}
    hits = rows_of("reports/dwr/simulated_hits.csv")
    assert [(row["capacity"], row["policy"]) for row in hits if row["per_layer"] == "False"] == [
        (capacity, policy) for capacity in ("2", "3", "10") for policy in ("lru", "lfu", "min")
    ]
    shares = [(row["capacity"], row["policy"]) for row in hits if row["per_layer"] == "True"]
    assert shares == [(capacity, policy) for capacity in ("2", "3", "10") for policy in ("lru", "lfu", "min")
                      if policy != "lfu" or capacity == "3"]  # fmt: skip
    trace = load_trace("data/dwr/trace")
    for row in hits:
        if (row["policy"], row["per_layer"]) == ("lru", "False"):
            for rate, experts in (("hit_rate", trace.experts), ("uniform_hit_rate", uniform_trace(trace).experts)):
                assert float(row[rate]) == lru_hit_rate(experts.tolist(), int(row["capacity"]))
        if (row["capacity"], row["per_layer"]) == ("3", "False"):
            assert float(row["hit_rate"]) == simulation["hit_rate"][row["policy"]]


def test_a_check_without_a_measurement_is_neither_passed_nor_failed(trained, no_processes, monkeypatch):
    def checks(name: str) -> dict[str, bool | None]:
        return json.loads(Path(f"data/dwr/{name}/summary.json").read_text())["checks"]

    stage("export_experts").main(tiny_settings())
    grid = {"policies": ["lfu"], "prefetchers": ["gate"], "repeats": 1}
    no_processes.main(tiny_settings(**grid))
    assert {name for name, passed in checks("cache").items() if passed is None} == {
        "every_repeat_has_the_same_hits_and_misses",
        "without_prefetching_every_miss_is_one_read",
    }
    assert checks("measured/cache") == {
        "no_more_experts_are_in_memory_than_the_capacity": True
    }  # LRU, whatever the grid
    unknown = benchmark.Memory(4, None, None)
    monkeypatch.setattr(no_processes, "peak_memory", lambda *arguments: {Cell(size): unknown for size in (None, 1, 3)})
    no_processes.main(tiny_settings(**grid))
    assert checks("measured/cache") == {"no_more_experts_are_in_memory_than_the_capacity": None}


def test_a_logit_that_differs_stops_the_benchmark(trained, no_processes, monkeypatch):
    stage("export_experts").main(tiny_settings())
    load_resident = benchmark.load_resident

    def off_by_one_bit(store, device):
        model = load_resident(store, device)
        model.output.weight.view(torch.int32)[7, 0] ^= 1
        return model

    monkeypatch.setattr(benchmark, "load_resident", off_by_one_bit)
    with pytest.raises(DynarouteError, match=r"capacity=1, .*logits of text 0 are not those of the resident model"):
        no_processes.main(tiny_settings())
    assert not Path("data/dwr/cache/cells.csv").exists()


def test_the_gpu_benchmark_records_every_cell_from_host_memory_and_from_disk(trained, no_processes):
    stage("export_experts").main(tiny_settings())
    no_processes.main(tiny_settings())
    stage("benchmark_gpu_cache").main(tiny_settings())
    report = json.loads(Path("reports/benchmarks/gpu_cache.json").read_text())
    found = [(row["experts_in"], row["capacity"], row["policy"], row["prefetch"]) for row in report["rows"]]
    cold = [(3, "lru", prefetch) for prefetch in ("none", "gate")]
    places = (("host memory", CELLS), ("disk", CELLS), ("disk, cold", cold))
    assert found == [(place, *cell) for place, cells in places for cell in cells]
    # What the cache does is what the other benchmark found, whatever the device and wherever the experts are.
    rates = [float(row["decode_hit_rate"]) for row in rows_of("data/dwr/cache/cells.csv") if row["prefetch"] == "none"]
    warm = report["rows"][: 2 * len(CELLS)]
    assert [row["hit_rate"] for row in warm if row["prefetch"] == "none"] == rates * 2
    assert report["decodings"] == len(found) * 2 * 2
    assert report["decodings_with_a_logit_not_equal_to_the_bit"] == 0
    assert all(row["ratio_lowest"] <= row["ratio_to_resident"] <= row["ratio_highest"] for row in report["rows"])


def test_on_a_gpu_other_bits_are_told_and_only_another_text_stops_the_benchmark():
    logits = torch.tensor([[[1.0, 2.0, 3.0]]])
    for device in ("cpu", "cuda"):
        assert benchmark.is_exact(logits, logits.clone(), device, "logits")
        with pytest.raises(DynarouteError, match="logits are not those of the resident model"):
            benchmark.is_exact(logits, logits.flip(-1), device, "logits")
    assert not benchmark.is_exact(logits, logits + 1e-6, "cuda", "logits")
    with pytest.raises(DynarouteError):
        benchmark.is_exact(logits, logits + 1e-6, "cpu", "logits")


def test_a_store_that_is_not_the_model_stops_the_export(trained, monkeypatch):
    module = stage("export_experts")
    write = module.export_store

    def export_another(model, *arguments):
        write(make_model(seed=9, vocab_size=model.config.vocab_size), *arguments)

    monkeypatch.setattr(module, "export_store", export_another)
    with pytest.raises(DynarouteError, match="failed: reassembled_weights"):
        module.main(tiny_settings())


def test_precisions_are_compared_on_the_calibration_windows(trained, monkeypatch):
    module, seen = stage("export_experts"), []
    for name in ("record_routing", "compare_precisions"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, call=original: seen.append(given[1]) or call(*given))
    module.main(changed(tiny_settings(), export_experts={"calibration_windows": 2}))
    routed, compared = seen
    assert compared is routed
    assert compared.indices == [0, len(compared.windows) // 2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"capacities": [1, 11]}, "capacities = .*10 experts in all"),
        ({"num_prompts": 10**6}, r"num_prompts = 1000000: must be at most \d+, .* of 11 tokens in the test split$"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_text_are_refused(trained, no_processes, changes, named):
    stage("export_experts").main(tiny_settings())
    with pytest.raises(DynarouteError, match=f"params.yaml: benchmark_cache.{named}"):
        no_processes.main(tiny_settings(**changes))


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("data/dwr/train/run.json", "{}", "run.json: lacks 'config'"),
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


def test_a_trace_of_another_run_is_refused(trained):
    stage("export_experts").main(tiny_settings())
    stage("trace_routing").main(tiny_settings())
    path = Path("data/dwr/trace/metadata.json")
    path.write_text(path.read_text().replace(RUN, "fedcba"))
    with pytest.raises(DynarouteError, match="data/dwr/trace: belongs to run fedcba"):
        stage("simulate_cache").main(tiny_settings())


def test_a_sweep_counts_prefill_and_decode_apart(tmp_path):
    store = export(tmp_path / "store")
    cells = [Cell(10), Cell(3, "next_use", "gate", cold=True)]
    texts = torch.arange(22).view(2, 11) * 7 % 64
    passes = sweep(store, texts, 7, cells, lookahead=2, repeats=1)
    assert list(passes) == [Cell(), *cells]
    (resident,), (held,), (cold,) = passes.values()
    assert resident.prefill == resident.decode == CacheStatistics()
    assert all(len(seconds) == 2 for seconds in (resident.prefill_seconds, held.decode_seconds, cold.decode_seconds))
    # Where everything has room, what is missing is what the text itself has not asked for before.
    with torch.inference_mode():
        chosen = torch.stack([layer.chosen for layer in make_model()(texts).router])  # [L, B, T, K]
    prompt, whole = (
        sum(len(chosen[layer, text, :end].unique()) for layer in range(2) for text in range(2)) for end in (7, 11)
    )
    assert (held.prefill.misses, held.decode.misses) == (prompt, whole - prompt)
    assert held.prefill.hits == 0
    assert held.decode.requests == cold.decode.requests == 2 * 4 * 2 * 2
    assert held.decode.evictions == 0
    assert cold.decode.predicted == 2 * 4 * 2  # of the second layer


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the kinds of memory apart")
def test_evicted_experts_leave_memory(tmp_path):
    model = make_model(d_model=128, d_ff=1024, num_experts=8)  # 1 MiB an expert, 16 MiB in all
    store = export(tmp_path / "store", model)
    (tmp_path / "cache").mkdir()
    for file in list(store.path.iterdir()):  # as DVC links it with cache.type symlink
        file.rename(tmp_path / "cache" / file.name)
        file.symlink_to(tmp_path / "cache" / file.name)
    pages = store.expert_bytes + 2 * 4096
    memory = peak_memory(store.path, torch.arange(24).view(1, 24), 16, [2, 16])
    assert memory[Cell()].mapped_experts == 0
    assert store.expert_bytes < memory[Cell(2)].mapped_experts <= 2 * pages
    assert 2 * pages < memory[Cell(16)].mapped_experts <= 16 * pages
    saved = memory[Cell()].anonymous - memory[Cell(2)].anonymous
    assert saved > 12 * store.expert_bytes  # of 16
