"""The stage from files to files, on a tiny base and predictor whose text comes from two sources."""

import csv
import json
from pathlib import Path

import analyze_topology as stage
import evaluate_nll
import numpy as np
import pytest
import torch
from small_base import EMBEDDING
from small_dagformer import (
    HEADS,
    LAYERS,
    PREFIX,
    SEQ_LEN,
    WINDOWS,
    make_base,
    make_predictor,
    make_windows,
    tiny_settings,
    write_all,
    write_variant,
)
from small_settings import changed

from dynaroute.analysis.controls import shifts
from dynaroute.analysis.statistics import paired_difference
from dynaroute.config import Settings
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.documents import domain_windows
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256, write_json
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint

FILES = [f"data/dagformer/analysis/P1/{name}" for name in ("topology.json", "wirings.safetensors")]


def settings() -> Settings:
    return changed(tiny_settings(), analysis={"permutations": 99, "swaps": 2, "domain_windows": 6})


def write_domains() -> None:
    """What encode_windows leaves of the windows of each source: here, sums of their tokens."""
    shards = TokenShards("data/tokens/docs", "test")
    drawn = domain_windows(shards, SEQ_LEN, settings().analysis.domain_windows)
    tokens, _ = Windows(shards, SEQ_LEN, keep_tail=False).batch(drawn.windows)
    vectors = torch.stack([(tokens * (k + 1)).sum(1).sin() for k in range(EMBEDDING)], dim=1).numpy()
    folder = Path("data/dagformer/embeddings/domains")
    folder.mkdir()
    np.save(folder / "domains.npy", vectors)
    files = {"domains": {"file": "domains.npy", "windows": len(vectors), "sha256": sha256(folder / "domains.npy")}}
    write_json(folder / "metadata.json", {"embedding_size": EMBEDDING, "files": files})


@pytest.fixture
def analyze(tmp_path, monkeypatch):
    """Evaluates and analyses P1 as a predictor with the given knobs, in the working directory; returns the report."""
    monkeypatch.chdir(tmp_path)
    write_all(settings())
    write_domains()

    def analyze(again: bool = False, **knobs) -> dict:
        if not again:
            write_variant("P1", make_predictor(**knobs))
            evaluate_nll.main(settings(), "P1")
        stage.main(settings(), "P1")
        return json.loads(Path(FILES[0]).read_text())

    return analyze


def test_one_topology_for_all_texts_is_shown_as_such(analyze):
    found = analyze(predictor_input="none")
    for protocol in ("window", "prefix"):
        for mode in ("soft", "hard"):
            varied = found["variation"][protocol][mode]
            assert varied.pop("distinct") == 1
            assert (varied.pop("entropy_bits") > 0) == (mode == "soft")
            assert varied == pytest.approx(dict.fromkeys(varied, 0.0), abs=1e-12)
        assert found["swapped"][protocol]["mean"] == 0
    for mode in ("soft", "hard"):
        assert found["reading"][mode]["read_minus_not_read"]["mean"] == 0
    assert found["domains"]["separation"]["p"] == 1
    half = pytest.approx(0.5)  # of two sources
    assert found["domains"]["probe"] == {"observed": half, "chance": half, "p": 1}


def test_a_predictor_that_reads_the_text_varies(analyze):
    found = analyze()
    assert found["checks"] == {"wirings_are_those_that_were_evaluated": True}
    varied = found["variation"]["window"]["soft"]
    assert varied["distinct"] == WINDOWS
    assert varied["gate_variance"] > 1e-4
    assert 1 < varied["effective_rank"] < WINDOWS
    tensors, _ = load_checkpoint(FILES[1])  # of the figure
    assert float(tensors["distances"].mean()) == pytest.approx(varied["distance_mean"])
    assert tensors["same_text"].shape == (WINDOWS,) and (tensors["same_text"] > 0).all()
    assert sum(found["domains"]["documents"]) > 2


def test_texts_are_scored_under_the_wirings_of_others(analyze, tmp_path):
    found = analyze()
    predictor, graph, windows = make_predictor(), DagForward(make_base()), make_windows(tmp_path / "again")
    tokens, targets = windows.batch(range(WINDOWS))
    with Path("data/dagformer/eval/P1/nll.csv").open(newline="") as file:
        documents = np.array([int(row["document"]) for row in csv.DictReader(file)])
    for protocol, first in (("window", 0), ("prefix", PREFIX - 1)):
        vectors = np.load(f"data/dagformer/embeddings/evaluation/test{'_prefix' if first else ''}.npy")
        wirings = predictor(torch.from_numpy(vectors), 0.5, "soft").detach()
        turned = [wirings.roll(shift, 0) for shift in (WINDOWS // 3, 2 * WINDOWS // 3)]
        others = np.mean([nll_of(graph, tokens, targets, other, first) for other in turned], axis=0)
        own = nll_of(graph, tokens, targets, wirings, first)
        expected = paired_difference(own, others, documents[:WINDOWS])
        assert found["swapped"][protocol]["mean"] == pytest.approx(expected.mean, abs=1e-5)
        assert found["swapped"][protocol]["low"] == pytest.approx(expected.low, abs=1e-5)


def test_no_text_is_scored_under_its_own_wiring_or_twice_under_that_of_another():
    for n in range(2, 50):
        for number in range(1, n):
            found = shifts(n, number)
            assert len(found) == len(set(found)) == number
            assert set(found) <= set(range(1, n))
    assert shifts(48, 2) == [16, 32]


def test_what_reading_the_answer_is_worth_is_measured_on_the_same_tokens(analyze, tmp_path):
    found = analyze()["reading"]
    predictor, graph, windows = make_predictor(), DagForward(make_base()), make_windows(tmp_path / "again")
    tokens, targets = windows.batch(range(WINDOWS))
    baseline = nll_of(graph, tokens, targets, torch.ones(WINDOWS, LAYERS * HEADS, LAYERS * HEADS), PREFIX - 1)
    for mode in ("soft", "hard"):
        nll = {}
        for name, split in (("read", "test"), ("not_read", "test_prefix")):
            vectors = torch.from_numpy(np.load(f"data/dagformer/embeddings/evaluation/{split}.npy"))
            nll[name] = nll_of(graph, tokens, targets, predictor(vectors, 0.5, mode).detach(), PREFIX - 1)
            expected = (nll[name] - baseline).mean()
            assert found[mode][name]["mean"] == pytest.approx(expected, abs=1e-5)
        expected = (nll["read"] - nll["not_read"]).mean()
        assert found[mode]["read_minus_not_read"]["mean"] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def nll_of(graph, tokens, targets, adjacency, first) -> np.ndarray:
    logits = graph(tokens, adjacency)
    return torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")[:, first:].mean(1).numpy()


def test_gates_of_another_run_fail_the_check(analyze):
    analyze()
    path = Path("data/dagformer/eval/P1/gates.safetensors")
    tensors, state = load_checkpoint(path)
    tensors["prefix.logits"][0, 0] += 1e-3
    save_checkpoint(path, tensors, state)
    assert analyze(again=True)["checks"] == {"wirings_are_those_that_were_evaluated": False}


def test_vectors_of_other_windows_are_refused(analyze):
    analyze()
    path = Path("data/dagformer/embeddings/domains/metadata.json")
    write_json(path, {"embedding_size": EMBEDDING, "files": {}})
    with pytest.raises(DynarouteError, match=r"embeddings/domains: 0 texts of domains, not \d+: run the stage"):
        analyze(again=True)
