"""The stage evaluate_nll, from files to files."""

import csv
import json
from pathlib import Path

import evaluate_nll as stage
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_base import HEADS, LAYERS, SEQ_LEN, make_base
from small_dagformer import ORDER, PREFIX, RUN, WINDOWS, make_predictor, tiny_settings, write_all, write_variant

from dynaroute.analysis.controls import equally_dense
from dynaroute.dagformer.gates import cascade, dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint

BASELINE_COLUMNS = ("protocol", "window", "document", "source", "nll_baseline")
OUTPUTS = [f"data/dagformer/eval/{{}}/{name}" for name in ("nll.csv", "nll.json", "gates.safetensors")]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """The working directory, with the files that the stage reads for the variant P1."""
    monkeypatch.chdir(tmp_path)
    write_all(tiny_settings())
    write_variant("P1", make_predictor())
    return tmp_path


def rows_of(name: str) -> list[dict[str, str]]:
    with Path(OUTPUTS[0].format(name)).open(newline="") as file:
        return list(csv.DictReader(file))


def report_of(name: str) -> dict:
    return json.loads(Path(OUTPUTS[1].format(name)).read_text())


def nll_of(rows: list[dict[str, str]], protocol: str, mode: str) -> np.ndarray:
    return np.array([float(row[f"nll_{mode}"]) for row in rows if row["protocol"] == protocol])


def baseline_of(name: str) -> list[tuple[str, ...]]:
    """What must not depend on the variant, to the last digit."""
    return [tuple(row[key] for key in BASELINE_COLUMNS) for row in rows_of(name)]


def plain_nll(logits: torch.Tensor, targets: list[int], first: int) -> float:
    losses = [-torch.log_softmax(logits[t].double(), -1)[targets[t]].item() for t in range(first, len(targets))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("input_norm", ["none", "rms_post"])
def test_every_number_of_a_row_is_what_the_protocols_say(tree, input_norm):
    predictor = make_predictor(input_norm=input_norm)
    write_variant("P1", predictor)
    stage.main(tiny_settings(), "P1")
    rows = rows_of("P1")
    assert [row["protocol"] for row in rows] == ["window"] * WINDOWS + ["prefix"] * WINDOWS
    shards = TokenShards(Path("data/tokens/docs"), "test")
    base = make_base()
    graph = DagForward(base, input_norm)
    document_of = np.searchsorted(shards.offsets, np.arange(shards.num_tokens), side="right") - 1
    vectors = torch.from_numpy(np.load("data/dagformer/embeddings/evaluation/test.npy"))
    with torch.no_grad():
        hard, valid = predictor(vectors, 0.5, "hard"), dag_mask(LAYERS, HEADS)
    controls = {
        "random": equally_dense(hard, valid, tiny_settings().seed),
        "least_gradient": equally_dense(hard, valid, 0, np.array(ORDER)),
    }
    assert len({row["window"] for row in rows}) == WINDOWS
    for position, row in enumerate(rows):
        index, prefix = position % WINDOWS, row["protocol"] == "prefix"
        window, document = int(row["window"]), int(row["document"])
        stream = shards.read(window * SEQ_LEN, (window + 1) * SEQ_LEN + 1).tolist()
        assert set(document_of[window * SEQ_LEN : (window + 1) * SEQ_LEN].tolist()) == {document}
        assert row["source"] == ("ants", "bees")[document % 2]
        first = PREFIX - 1 if prefix else 0  # what it predicts is token PREFIX, the first one not read
        embedding = np.load(f"data/dagformer/embeddings/evaluation/{'test_prefix' if prefix else 'test'}.npy")[index]
        tokens = torch.tensor([stream[:-1]])
        with torch.no_grad():
            logits = {"baseline": base(tokens).logits}
            for mode in ("soft", "hard"):
                logits[mode] = graph(tokens, predictor(torch.from_numpy(embedding)[None], 0.5, mode))
            for mode, wirings in controls.items():  # of the window protocol's density, scored by both
                logits[mode] = graph(tokens, wirings[index : index + 1])
        for mode, values in logits.items():
            assert float(row[f"nll_{mode}"]) == pytest.approx(plain_nll(values[0], stream[1:], first), abs=1e-5)


def test_the_prefix_protocol_does_not_see_the_vectors_of_whole_windows(tree):
    stage.main(tiny_settings(), "P1")
    before, report = rows_of("P1"), report_of("P1")
    path = Path("data/dagformer/embeddings/evaluation/test.npy")
    np.save(path, np.load(path)[::-1].copy())
    record = json.loads(path.with_name("metadata.json").read_text())
    record["files"]["test"]["sha256"] = stage.sha256(path)
    path.with_name("metadata.json").write_text(json.dumps(record))
    stage.main(tiny_settings(), "P1")
    after = rows_of("P1")
    for mode in ("soft", "hard", "baseline"):  # the controls have the window protocol's density in both
        assert nll_of(before, "prefix", mode).tolist() == nll_of(after, "prefix", mode).tolist()
    changed = nll_of(before, "window", "soft") != nll_of(after, "window", "soft")
    assert changed.sum() >= WINDOWS - 1  # all but the middle
    for key in ("nll_hard", "density_hard", "mean_A"):
        assert report["prefix"][key] == report_of("P1")["prefix"][key]


def test_the_summary_follows_from_the_rows(tree):
    stage.main(tiny_settings(), "P1")
    rows, report = rows_of("P1"), report_of("P1")
    assert (report["run"], report["variant"], report["n"]) == (RUN, "P1", WINDOWS)
    assert len(report["checks"]) == 2
    assert all(passed is True for passed in report["checks"].values())
    for protocol in ("window", "prefix"):
        found = report[protocol]
        assert found["tokens"] == WINDOWS * (SEQ_LEN + 1 - PREFIX if protocol == "prefix" else SEQ_LEN)
        for mode in ("soft", "hard", "random", "least_gradient", "baseline"):
            assert found[f"nll_{mode}"] == pytest.approx(nll_of(rows, protocol, mode).mean())


@pytest.mark.parametrize("knobs", [{}, {"cascade": "learnable"}, {"cascade": "off"}, {"exempt_first_layer": False}])
def test_gates_can_be_made_again_from_the_stored_logits(tree, knobs):
    predictor = make_predictor(**knobs)
    if predictor.log_k is not None:
        predictor.log_k.data += 1.0  # as if it had been trained
    write_variant("A1", predictor)
    stage.main(tiny_settings(), "A1")
    tensors, state = load_checkpoint(OUTPUTS[2].format("A1"))
    assert state["windows"] == [int(row["window"]) for row in rows_of("A1")[:WINDOWS]]
    mask = dag_mask(state["num_layers"], state["num_heads"])
    report = report_of("A1")
    for protocol in ("window", "prefix"):
        z = torch.full((WINDOWS, *mask.shape), -torch.inf)
        z[:, mask] = tensors[f"{protocol}.logits"]
        for mode, gates in (("soft", torch.sigmoid(z / state["tau"])), ("hard", (z > 0).float())):
            if predictor.variant.cascade != "off":
                exempt = predictor.variant.exempt_first_layer
                gates = cascade(gates, state["cascade_k"], state["num_heads"], mode == "hard", exempt)
            torch.testing.assert_close(tensors[f"{protocol}.mean_{mode}"], gates.mean(0))
            name = "mean_A" if mode == "soft" else "density_hard"
            assert report[protocol][name] == pytest.approx(gates[:, mask].mean().item(), rel=1e-5)


def test_a_predictor_that_opens_everything_shows_no_difference(tree):
    write_variant("S1", make_predictor(init_logit=1000.0))
    stage.main(tiny_settings(), "S1")
    for protocol in ("window", "prefix"):
        found = report_of("S1")[protocol]
        assert found["nll_hard"] == found["nll_baseline"]
        assert (found["density_hard"], found["dead_heads"]) == (1.0, 0)
        assert found["mean_A"] == pytest.approx(1.0, abs=1e-4)  # sigmoid(5 * 2) of the cascade


def test_a_joint_variant_is_scored_on_its_own_base_but_for_the_baseline(tree):
    own = make_base(seed=5)
    write_variant("A1", make_predictor())
    write_variant("J1", make_predictor(base_lr=1e-3))
    own.save_pretrained("data/dagformer/train/J1/base")
    for name in ("A1", "J1"):
        stage.main(tiny_settings(), name)
    assert baseline_of("A1") == baseline_of("J1")
    windows = stage.variant_windows(TokenShards(Path("data/tokens/docs"), "test"), tiny_settings().dagformer)
    tokens, targets = windows.batch(range(WINDOWS))
    with torch.no_grad():
        logits = own(tokens).logits
    for protocol, first in (("window", 0), ("prefix", PREFIX - 1)):
        expected = [plain_nll(row, target, first) for row, target in zip(logits, targets.tolist(), strict=True)]
        assert report_of("J1")[protocol]["nll_own_base"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert "nll_own_base" not in report_of("A1")[protocol]
        frozen, joint = (nll_of(rows_of(name), protocol, "soft") for name in ("A1", "J1"))
        assert (frozen != joint).all()
    vectors = torch.from_numpy(np.load("data/dagformer/embeddings/evaluation/test.npy"))
    with torch.no_grad():
        logits = DagForward(own)(tokens, make_predictor()(vectors, 0.5, "soft"))
    expected = [plain_nll(row, target, 0) for row, target in zip(logits, targets.tolist(), strict=True)]
    assert nll_of(rows_of("J1"), "window", "soft") == pytest.approx(expected, abs=1e-5)


def test_another_base_than_the_one_trained_on_fails_its_check(tree):
    make_base(seed=5).save_pretrained("data/dagformer/train/base")
    stage.main(tiny_settings(), "P1")
    failed = [name for name, passed in report_of("P1")["checks"].items() if not passed]
    assert failed == ["base_is_the_file_that_the_variant_was_trained_on"]


def test_input_that_does_not_fit_is_an_error_in_one_line(tree):
    with pytest.raises(DynarouteError, match=r"data/dagformer/embeddings/evaluation: 11 texts, but 4 windows"):
        stage.main(tiny_settings(eval_windows=4), "P1")
    path = Path("data/dagformer/train/P1/predictor.safetensors")
    save_checkpoint(path, load_file(path), {"run": "another", "step": 7})
    with pytest.raises(DynarouteError, match="train/P1: files of two runs, 0123456789abcdef and another"):
        stage.main(tiny_settings(), "P1")
    Path("data/dagformer/train/P1/run.json").write_text('{"run": "1"}')
    with pytest.raises(DynarouteError, match=r"data/dagformer/train/P1/run\.json: lacks 'knobs'"):
        stage.main(tiny_settings(), "P1")
    with pytest.raises(DynarouteError, match=r"data/dagformer/train/P9/run\.json: cannot be read"):
        stage.main(tiny_settings(), "P9")
    assert not Path(OUTPUTS[0].format("P1")).exists()
