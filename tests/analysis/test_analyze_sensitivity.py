"""The stage from files to files: what it says is what plain computations of the same windows say."""

import csv
import json
from pathlib import Path

import analyze_sensitivity as stage
import numpy as np
import pytest
import torch
from small_dagformer import HEADS, LAYERS, SEQ_LEN, make_base, tiny_settings, write_all

from dynaroute.analysis.statistics import paired_difference
from dynaroute.config import Settings
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError

REPORTS = Path("reports/dagformer")
FILES = [
    *("sensitivity.json", "gate_gradients.csv", "removal.csv", "removal_layer_pairs.csv", "removal_heads.csv"),
    "oracle.csv",
]
ANALYSIS = {
    **{"permutations": 99, "gradient_windows": 5, "removal_windows": 4, "removal_fractions": [0.25, 1.0]},
    **{"random_removals": 2, "oracle_windows": 3, "oracle_steps": 4, "oracle_lr": 0.1},
}


def settings(**changes) -> Settings:
    tiny = tiny_settings()
    return tiny.model_copy(update={"analysis": tiny.analysis.model_copy(update=ANALYSIS | changes)})


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_all(tiny_settings())
    return tmp_path


def rows(name: str) -> list[dict[str, str]]:
    with (REPORTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_runs_write_the_same_bytes(tree):
    contents = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        stage.main(settings())
        contents.append([(REPORTS / name).read_bytes() for name in FILES])
    assert contents[0] == contents[1]


def test_removing_everything_is_the_base_without_any_connection(tree):
    stage.main(settings())
    found = json.loads((REPORTS / "sensitivity.json").read_text())
    assert all(passed is True for passed in found["checks"].values())
    assert (found["flatness"]["n"], found["removal"]["n"]) == (5, 4)
    whole = [row for row in rows("removal") if row["fraction"] == "1.0"]
    assert [row["order"] for row in whole] == ["random", "least_gradient", "expected_gain"]
    assert len({row["difference"] for row in whole}) == 1
    nll = nll_without_connections()
    documents = stage.windows_of_documents(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN)
    own = documents[scored_windows()]
    change = np.array([(nll[0] - nll[1])[own == document].mean() for document in np.unique(own)])
    expected = paired_difference(change, np.zeros_like(change))
    assert float(whole[0]["difference"]) == pytest.approx(expected.mean, abs=1e-5)
    assert float(whole[0]["low"]) == pytest.approx(expected.low, abs=1e-5)


def scored_windows() -> list[int]:
    documents = stage.windows_of_documents(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN)
    return stage.halves(documents, settings().analysis)[1]


def nll_without_connections() -> np.ndarray:
    """NLL of the windows that removals are scored on, by a plain forward with no gate open, and by transformers."""
    windows = stage.Windows(TokenShards(Path("data/tokens/docs"), "test"), SEQ_LEN, keep_tail=False)
    tokens, targets = windows.batch(scored_windows())
    base = make_base()
    with torch.no_grad():
        logits = [DagForward(base)(tokens, torch.zeros(4, LAYERS * HEADS, LAYERS * HEADS)), base(tokens).logits]
    losses = [torch.nn.functional.cross_entropy(one.mT, targets, reduction="none").mean(1) for one in logits]
    return torch.stack(losses).numpy()


def test_there_is_a_row_for_each_layer_pair_head_order_and_text(tree):
    stage.main(settings())
    pairs = [("0", "1"), ("0", "2"), ("1", "2")]
    for name in ("gate_gradients", "removal_layer_pairs"):
        assert [(row["source"], row["target"]) for row in rows(name)] == pairs
    assert [(row["layer"], row["head"]) for row in rows("removal_heads")] == [
        (str(layer), str(head)) for layer in range(LAYERS) for head in range(HEADS)
    ]
    assert len(rows("removal")) == 3 * 2
    found = json.loads((REPORTS / "sensitivity.json").read_text())
    for kind, of in (("layer_pairs", 3), ("heads", LAYERS * HEADS)):
        own = found["removal"][kind]
        assert own["better"] + own["worse"] + own["no_difference_shown"] == of
        assert own["detectable"] == pytest.approx(
            np.median([float(row["detectable"]) for row in rows(f"removal_{kind}")])
        )
    total = {}
    for text in ("same", "next", "other"):
        own = [row for row in rows("oracle") if row["text"] == text]
        gains = [float(row["nll_oracle"]) - float(row["nll_baseline"]) for row in own]
        assert len({row["document"] for row in own}) == found["oracle"][text]["documents"] == 3
        assert found["oracle"][text]["difference"] == pytest.approx(np.mean(gains))
        total[text] = sum(gains)
        assert found["oracle"][text]["n"] == 3
        shift = {"same": 0, "next": 1}.get(text)
        assert shift is None or all(int(row["scored_window"]) - int(row["window"]) == shift for row in own)
    document_of = {row["window"]: row["document"] for row in rows("oracle")}
    assert all(document_of[row["scored_window"]] != row["document"] for row in own)  # the others
    assert found["oracle"]["same"]["difference"] < 0
    assert found["oracle"]["carried_over"]["mean"] == pytest.approx(total["next"] / total["same"])


def test_orders_are_compared_with_the_random_one_where_there_is_an_order(tree):
    stage.main(settings())
    found = json.loads((REPORTS / "sensitivity.json").read_text())["removal"]["orders"]
    assert [(row["order"], row["fraction"]) for row in found] == [("least_gradient", 0.25), ("expected_gain", 0.25)]
    written = {(row["order"], row["fraction"]): float(row["difference"]) for row in rows("removal")}
    for row in found:
        apart = written[row["order"], "0.25"] - written["random", "0.25"]
        assert row["difference"] == pytest.approx(apart, abs=1e-9)


def test_gradients_and_removals_never_share_a_document():
    documents = np.array([-1, 0, 0, 3, 3, -1, 4, 5, 5, 5, -1, 7, 9])
    analysis = settings(gradient_windows=99, removal_windows=99).analysis
    first, second = ({int(documents[window]) for window in half} for half in stage.halves(documents, analysis))
    assert not first & second
    assert first | second == {0, 3, 4, 5, 7, 9}
    few = stage.halves(documents, settings(gradient_windows=2, removal_windows=3).analysis)
    assert [len(half) for half in few] == [2, 3]


def test_windows_are_chosen_evenly_over_documents_however_long_they_are():
    documents = np.repeat(np.arange(8), [90, 80, 3, 3, 3, 3, 3, 3])
    chosen = stage.halves(documents, settings(gradient_windows=8, removal_windows=4).analysis)
    assert [np.bincount(documents[half])[parity::2].tolist() for parity, half in enumerate(chosen)] == [
        *([2, 2, 2, 2], [1, 1, 1, 1])
    ]


@pytest.mark.parametrize("sizes", [[1, 1, 30], [30, 1, 1], [1, 1], [6, 6], [3, 4, 5], [1] * 12, [2, 9]])
def test_the_oracles_other_text_is_of_another_document(sizes):
    followed = np.repeat(np.arange(len(sizes)), np.array(sizes) + 1)
    own = followed[stage.followed_windows(followed, settings(oracle_windows=12).analysis)]
    partners = np.array(stage.other_texts(own))
    assert len(partners) == min(12, sum(sizes))
    assert (own[partners] != own).all()
    times, largest = np.bincount(partners, minlength=len(own)), np.bincount(own).argmax()
    if 2 * (own == largest).sum() > len(own):
        times = times[own != largest]
    assert times.max() - times.min() <= 1  # no text serves much more often than another


@pytest.mark.parametrize("documents", [[0, 0, 0, -1], [0, 1, 2, -1], [-1, -1]])
def test_too_few_documents_are_refused(documents):
    with pytest.raises(DynarouteError, match=r"analysis: too few documents .* hold a whole window \(\d\)"):
        stage.halves(np.array(documents), settings().analysis)


def test_text_without_windows_that_go_on_is_refused():
    with pytest.raises(DynarouteError, match=r"analysis.oracle_windows = 3: 1 documents .* in a row"):
        stage.followed_windows(np.array([-1, 0, 0, 1, 2, -1, 3]), settings().analysis)
