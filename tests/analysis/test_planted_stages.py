"""The stages of the planted base, from files to files, on text of two sources."""

from pathlib import Path

import analyze_planted
import evaluate_nll
import numpy as np
import order_edges
import plant_base
import pytest
import small_tokens
import torch
from small_base import HEADS, LAYERS, SEQ_LEN, VOCABULARY
from small_dagformer import ORDER, WINDOWS, make_predictor, tiny_settings, write_embeddings, write_variant

from dynaroute.dagformer.decoder import load_base
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.planted import load_masks
from dynaroute.data.tokens.documents import spread_windows, windows_of_documents
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record
from dynaroute.training.nll import token_nll

DATA = Path("data/dagformer")
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_layers": LAYERS, "num_heads": HEADS, "contrast_from": 1}
TRAINING = {"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 1, "validate_every": 2}
VARIANTS = {  # C is the control of P, but not of other
    "P": {"from": "planted"},
    "C": {"from": "planted", "predictor_input": "none"},
    "other": {"from": "planted", "rank": 1},
    "natural": {"from": "base"},
}


def settings(planted=SIZES | {"training": TRAINING}):
    return tiny_settings(planted=planted, validation_windows=4).model_copy(update={"variants": VARIANTS})


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """Writes the corpus, of one source or several, into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def write(sources: list[str]) -> None:
        splits = {
            split: [
                np.random.default_rng(seed + n).integers(1, VOCABULARY, n).tolist() for n in (40, 70, 60, 61, 40, 23)
            ]
            for seed, split in enumerate(("train", "validation", "test"))
        }
        folder = small_tokens.write_tokens(Path("data/tokens/docs"), VOCABULARY, sources=sources, **splits)
        (folder / "tokenizer").mkdir()

    return write


def test_a_planted_base_is_trained_and_methods_are_measured_against_its_masks(tokens):
    tokens(["ants", "bees"])
    plant_base.main(settings())
    masks, names = load_masks(DATA / "train/planted")
    assert names == ["ants", "bees"] and masks[:, dag_mask(LAYERS, HEADS)].sum(1).tolist() == [len(ORDER) // 2] * 2
    order_edges.main(settings(), "planted")
    write_embeddings(DATA / "embeddings/evaluation")
    for name in ("P", "C", "other"):
        write_variant(name, make_predictor(predictor_input="none" if name == "C" else "text"), "planted")
        evaluate_nll.main(settings(), name)
    analyze_planted.main(settings())
    found, known = (read_record(DATA / f"planted/{name}.json") for name in ("methods", "known"))
    assert known["n"] == WINDOWS and known["window"]["minus_own"]["own"]["mean"] == 0
    assert {name: own["control"] for name, own in found.items()} == {"P": "C", "C": None, "other": None}
    for protocol in ("window", "prefix"):
        nll = {name: found[name][protocol]["nll"] for name in found}
        own, one = (known[protocol]["nll"][key] for key in ("own", "one"))
        evaluated = read_record(DATA / "eval/P/nll.json")[protocol]
        assert (nll["P"], one) == pytest.approx((evaluated["nll_hard"], evaluated["nll_baseline"]))
        assert found["P"][protocol]["escape"]["mean"] == pytest.approx((one - nll["P"]) / (one - own))
        assert found["P"][protocol]["context"]["mean"] == pytest.approx((nll["C"] - nll["P"]) / (nll["C"] - own))
        assert found["C"][protocol]["context"] is None
        assert found["C"][protocol]["probe"]["p"] == 1  # one wiring for all texts


def test_edges_are_ordered_by_the_size_of_their_mean_gradient_over_documents(tokens):
    tokens(["ants", "bees"])
    plant_base.main(settings())
    order_edges.main(settings(), "planted")
    shards, valid = TokenShards(Path("data/tokens/docs"), "validation"), dag_mask(LAYERS, HEADS)
    graph, by_document = DagForward(load_base(DATA / "train/planted", "cpu")), {}
    for window in spread_windows(shards, SEQ_LEN, 100):
        gates = valid.float()[None].requires_grad_()
        text, targets = Windows(shards, SEQ_LEN, keep_tail=False).batch([window])
        (gradient,) = torch.autograd.grad(token_nll(graph(text, gates), targets).mean(), gates)
        by_document.setdefault(int(windows_of_documents(shards, SEQ_LEN)[window]), []).append(gradient[0, valid])
    size = torch.stack([torch.stack(own).mean(0) for own in by_document.values()]).mean(0).abs()
    order = read_record(DATA / "edge_order/planted.json")["order"]
    assert sorted(order) == list(range(len(ORDER)))
    assert (size[order].diff() > -1e-6).all()


def test_masks_without_a_second_source_are_refused(tokens):
    tokens(["ants"])
    with pytest.raises(DynarouteError, match=r"^dagformer\.planted: corpus docs has one source, ants: must have two"):
        plant_base.main(settings())
    with pytest.raises(DynarouteError, match=r"^other: no base; known: base, planted"):
        order_edges.main(settings(), "other")
    assert not DATA.exists()


def test_without_a_planted_base_its_stages_leave_nothing_in_their_outputs(tokens):
    tokens(["ants"])
    plant_base.main(settings(planted=None))
    order_edges.main(settings(planted=None), "planted")
    analyze_planted.main(settings(planted=None))
    assert not list((DATA / "train/planted").iterdir())
    for name in ("edge_order/planted", "planted/known", "planted/methods"):
        assert read_record(DATA / f"{name}.json") == {}
