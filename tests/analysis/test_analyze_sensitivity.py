"""The stage from files to files: what it says is what plain computations of the same windows say."""

import csv
import json
from pathlib import Path

import analyze_sensitivity as stage
import numpy as np
import pandas as pd
import pytest
import torch
from small_dagformer import HEADS, LAYERS, SEQ_LEN, make_base, tiny_settings, write_all
from small_settings import changed

from dynaroute.analysis.nll import window_nll
from dynaroute.analysis.sensitivity import optimise_gates, other_texts
from dynaroute.analysis.statistics import paired_difference
from dynaroute.config import Settings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.documents import followed_windows, halves, windows_of_documents
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset

FOLDER = Path("data/dagformer/sensitivity")
ANALYSIS = {
    **{"permutations": 99, "gradient_windows": 5, "removal_windows": 4, "removal_fractions": [0.25, 1.0]},
    **{"group_removals": 2, "group_windows": 3},
    **{"random_removals": 2, "oracle_windows": 3, "oracle_steps": 4, "oracle_lr": 0.1},
}

SIZES = ANALYSIS["gradient_windows"], ANALYSIS["removal_windows"]


def settings() -> Settings:
    return changed(tiny_settings(), analysis=ANALYSIS)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_all(tiny_settings())
    return tmp_path


@pytest.fixture
def found(tree) -> dict:
    """The summary that the stage writes."""
    stage.main(settings())
    return json.loads((FOLDER / "summary.json").read_text())


def rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_removing_everything_is_the_base_without_any_connection(found):
    assert all(passed is True for passed in found["checks"].values())
    assert (found["flatness"]["n"], found["removal_windows"]) == (5, 4)
    whole = [row for row in rows("removal") if row["fraction"] == "1.0"]
    assert [row["order"] for row in whole] == ["random", "least_gradient", "expected_gain"]
    assert len({row["mean"] for row in whole}) == 1
    nll = nll_without_connections()
    documents = windows_of_documents(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN)
    own = documents[scored_windows()]
    expected = paired_difference(*nll, own)
    assert float(whole[0]["mean"]) == pytest.approx(expected.mean, abs=1e-5)
    assert float(whole[0]["low"]) == pytest.approx(expected.low, abs=1e-5)


def test_a_head_or_layer_pair_is_removed_with_all_its_edges(found):
    windows = Windows(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN, keep_tail=False)
    scored = Subset(windows, scored_windows()[:3])
    graph, opened = DagForward(make_base()), dag_mask(LAYERS, HEADS).float()
    for kind in ("layers", "head"):
        own = [row for row in found["groups"] if row["kind"] == kind]
        assert [row["expected"] for row in own] == sorted(row["expected"] for row in own)
        assert [row["promising"] for row in own] == [True] * (len(own) // 2) + [False] * (len(own) // 2)
        for row in own:
            gates = opened.view(LAYERS, HEADS, LAYERS, HEADS).clone()  # source layer, head, target layer, head
            if kind == "layers":
                gates[row["first"], :, row["second"]] = 0
            else:
                gates[row["first"], row["second"]] = 0
            nll = [window_nll(graph, scored, one.reshape(opened.shape)) for one in (gates, opened)]
            assert row["mean"] == pytest.approx((nll[0] - nll[1]).mean(), abs=1e-6)


@pytest.mark.parametrize("asked", [2, 99])
def test_groups_are_removed_from_evenly_chosen_windows_or_all_there_are(tree, monkeypatch, asked):
    seen = []
    monkeypatch.setattr(stage, "group_removals", lambda graph, *arguments: seen.extend(arguments))
    stage.main(changed(settings(), analysis={**ANALYSIS, "removal_windows": 99, "group_windows": asked}))
    windows, documents, *_ = seen
    of_windows = windows_of_documents(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN)
    scored = halves(of_windows, (ANALYSIS["gradient_windows"], 99))[1]
    assert 2 < len(scored) < 99
    used = scored if asked == 99 else [scored[0], scored[len(scored) // 2]]
    assert [windows.windows.indices[index] for index in windows.indices] == used
    assert documents.tolist() == of_windows[used].tolist()


def scored_windows() -> list[int]:
    documents = windows_of_documents(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN)
    return halves(documents, SIZES)[1]


def nll_without_connections() -> np.ndarray:
    """NLL of the windows that removals are scored on, by a plain forward with no gate open, and by transformers."""
    windows = Windows(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN, keep_tail=False)
    tokens, targets = windows.batch(scored_windows())
    base = make_base()
    with torch.no_grad():
        logits = [DagForward(base)(tokens, torch.zeros(4, LAYERS * HEADS, LAYERS * HEADS)), base(tokens).logits]
    losses = [torch.nn.functional.cross_entropy(one.mT, targets, reduction="none").mean(1) for one in logits]
    return torch.stack(losses).numpy()


def test_the_oracle_is_scored_on_its_own_window_the_next_and_one_of_another_document(found):
    assert len(rows("removal")) == 3 * 2
    found = found["oracle"]
    shards = TokenShards(Path("data/tokens/docs"), "test")
    windows, documents = Windows(shards, SEQ_LEN, keep_tail=False), windows_of_documents(shards, SEQ_LEN)
    own = followed_windows(documents, ANALYSIS["oracle_windows"])
    graph = DagForward(make_base())
    gates = optimise_gates(graph, Subset(windows, own), ANALYSIS["oracle_steps"], ANALYSIS["oracle_lr"])
    opened = dag_mask(LAYERS, HEADS).float()
    assert found["closed"] == pytest.approx(1 - float(gates.sum((1, 2)).mean() / opened.sum()), abs=1e-6)
    others = [own[index] for index in other_texts(documents[own])]
    for text, scored in {"same": own, "next": [window + 1 for window in own], "other": others}.items():
        nll = [window_nll(graph, Subset(windows, scored), adjacency) for adjacency in (gates, opened)]
        assert found[text]["mean"] == pytest.approx((nll[0] - nll[1]).mean(), abs=1e-6)
        assert found[text]["documents"] == 3
    assert found["same"]["mean"] < 0


@pytest.mark.usefixtures("found")
def test_orders_are_compared_with_the_random_one_at_the_same_fraction():
    found = pd.read_csv(FOLDER / "removal.csv").set_index(["order", "fraction"])
    random = found.loc["random", "mean"].to_dict()
    for (_, fraction), row in found.iterrows():
        assert row["over_random"] == pytest.approx(row["mean"] - random[fraction], abs=1e-9)
        assert row["low_over_random"] <= row["over_random"] <= row["high_over_random"]
    assert found.loc[("expected_gain", 1.0), "over_random"] == 0  # without any edge there is no order


@pytest.mark.parametrize("sizes", [[1, 1, 30], [30, 1, 1], [1, 1], [6, 6], [3, 4, 5], [1] * 12, [2, 9]])
def test_the_oracles_other_text_is_of_another_document(sizes):
    followed = np.repeat(np.arange(len(sizes)), np.array(sizes) + 1)
    own = followed[followed_windows(followed, 12)]
    partners = np.array(other_texts(own))
    assert len(partners) == min(12, sum(sizes))
    assert (own[partners] != own).all()
    times, largest = np.bincount(partners, minlength=len(own)), np.bincount(own).argmax()
    if 2 * (own == largest).sum() > len(own):
        times = times[own != largest]
    assert times.max() - times.min() <= 1  # no text serves much more often than another
