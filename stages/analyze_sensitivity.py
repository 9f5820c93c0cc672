"""How sensitive the base's NLL is to its wiring: X3 of the published report. No predictor takes part.

    python stages/analyze_sensitivity.py

Everything is on windows of the test split, which no training has seen. Orders of removal come from gradients on one
half of its documents and are scored on the other half.

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/base
Writes  reports/dagformer/sensitivity.json        flatness at A = 1, what was removed, the oracle, checks
        reports/dagformer/gate_gradients.csv      a row for each layer pair: gates; mean, size, spread and sign
            consistency of their gradients, means over gates; helpful, harmful, see `sensitivity.flatness`
        reports/dagformer/removal.csv             a row for each order and fraction of edges removed
        reports/dagformer/removal_layer_pairs.csv, removal_heads.csv   a row for each layer pair, and each head
            difference, low, high, n: NLL less that at A = 1, its paired 95 % t interval; p_holm in the latter two
        reports/dagformer/oracle.csv              a row for each window and text that its optimised gates are scored on
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynaroute.artifacts import sha256, write_csv, write_json
from dynaroute.config import Analysis, Settings
from dynaroute.dagformer.base import load_base
from dynaroute.dagformer.gates import dag_mask, layer_distance
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.shards import TokenShards, Windows
from dynaroute.data.windows import Selection
from dynaroute.errors import DynarouteError
from dynaroute.evaluation.domains import windows_of_documents
from dynaroute.evaluation.nll import sequence_nll, wired_nll
from dynaroute.evaluation.sensitivity import (
    describe_gradients,
    flatness,
    gate_gradients,
    nll_of_wirings,
    optimise_gates,
    removal_orders,
    without_edges,
    without_head,
    without_layer_pair,
)
from dynaroute.evaluation.statistics import (
    SIGNIFICANT,
    compare,
    corrected_verdict,
    holm,
    paired_difference,
    t_test_p,
    verdict,
)
from dynaroute.stage import run

BASE, REPORTS = Path("data/dagformer/base"), Path("reports/dagformer")
BATCH = 8  # windows. A constant: float sums depend on it


def main(settings: Settings) -> None:
    """Takes gradients, removes edges, optimises gates, and writes what was found."""
    torch.set_num_threads(settings.num_threads)
    analysis = settings.analysis
    shards = TokenShards(Path("data/tokens") / settings.dagformer.corpus, "test")
    windows = Windows(shards, settings.dagformer.seq_len, keep_tail=False)
    documents = windows_of_documents(shards, windows.seq_len)
    ranked, scored = (Selection(windows, half) for half in halves(documents, analysis))
    followed = followed_windows(documents, analysis)
    graph = DagForward(load_base(BASE, settings.device))

    gradients = gate_gradients(graph, ranked, BATCH).numpy().astype(np.float64)  # [n, E]
    adjacent = (layer_distance(graph.num_layers, graph.num_heads) == 1)[dag_mask(graph.num_layers, graph.num_heads)]
    sizes = [np.abs(gradients[:, part]).mean(1) for part in (adjacent.numpy(), ~adjacent.numpy())]
    groups = documents[ranked.indices]
    removal = remove(graph, scored, gradients.mean(0), analysis, settings.seed)
    oracle = optimise(graph, windows, followed, analysis)

    write_csv(REPORTS / "gate_gradients.csv", list(gradients_by_layer_pair(graph, gradients)))
    for name, rows in removal.items():
        write_csv(REPORTS / f"{name}.csv", rows)
    write_csv(REPORTS / "oracle.csv", oracle)
    write_json(
        REPORTS / "sensitivity.json",
        {
            "base": sha256(BASE / "model.safetensors"),
            "num_layers": graph.num_layers,
            "num_heads": graph.num_heads,
            "flatness": flatness(gradients, groups, analysis.permutations, settings.seed),
            "adjacent_minus_skip": compare(*sizes, groups, settings.seed)._asdict()
            | {"adjacent": float(sizes[0].mean()), "skip": float(sizes[1].mean())},
            "removal": {"n": len(scored)} | {
                name: summarise(removal[f"removal_{name}"]) for name in ("layer_pairs", "heads")
            },
            "oracle": {"steps": analysis.oracle_steps, "lr": analysis.oracle_lr, **summarise_oracle(oracle)},
            "checks": {
                "gradients_and_removals_are_of_different_documents": not set(groups)
                & set(documents[scored.indices]),
                "optimised_gates_are_better_on_their_own_window": all(
                    row["nll_oracle"] < row["nll_baseline"] for row in oracle if row["text"] == "same"
                ),
            },
        },
    )  # fmt: skip


def halves(documents: np.ndarray, analysis: Analysis) -> list[list[int]]:
    """Windows for gradients and windows for removals, evenly spaced: of every other document.

    Args:
        documents: which document each window is wholly within; -1 where none.
        analysis: how many of each are wanted.

    Raises:
        DynarouteError: there are fewer than two windows for one of them, or of less than two documents.
    """
    order = np.unique(documents, return_inverse=True)[1]
    chosen = []
    for parity, most in enumerate((analysis.gradient_windows, analysis.removal_windows)):
        pool = np.flatnonzero((documents >= 0) & (order % 2 == parity))
        if len(set(documents[pool])) < 2:
            number = len(set(documents[documents >= 0]))
            found = f"too few documents of the test split hold a whole window ({number})"
            raise DynarouteError(f"analysis: {found}: raise corpora's split.test, or lower dagformer.seq_len")
        number = min(most, len(pool))
        chosen.append([int(pool[i * len(pool) // number]) for i in range(number)])
    return chosen


def gradients_by_layer_pair(graph: DagForward, gradients: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row for each layer pair: what the gradients of its gates are."""
    found, layers = describe_gradients(gradients), graph.num_layers
    layer = torch.arange(layers * graph.num_heads) // graph.num_heads
    valid = dag_mask(layers, graph.num_heads)
    sources, targets = (part.expand(valid.shape)[valid].numpy() for part in (layer[:, None], layer[None, :]))
    certain = found["p"] < SIGNIFICANT
    for source in range(layers):
        for target in range(source + 1, layers):
            own = (sources == source) & (targets == target)
            row = {"source": source, "target": target, "gates": int(own.sum())}
            row |= {key: float(found[key][own].mean()) for key in ("mean", "size", "spread", "sign_consistency")}
            row["helpful"] = float((certain & (found["mean"] < 0))[own].mean())
            row["harmful"] = float((certain & (found["mean"] > 0))[own].mean())
            yield row


def remove(
    graph: DagForward, windows: Selection, mean_gradient: np.ndarray, analysis: Analysis, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """NLL without edges by order and fraction, without each layer pair's, and without each head's; rows by file."""
    sizes = graph.num_layers, graph.num_heads
    whole = nll_of_wirings(graph, windows, [dag_mask(*sizes).float()], BATCH, "no edge removed")[0]
    orders = removal_orders(mean_gradient, analysis.random_removals, seed)
    rows = []
    for name, drawn in orders.items():
        for fraction in analysis.removal_fractions:
            wirings = [without_edges(*sizes, order[: round(fraction * len(order))]) for order in drawn]
            nll = nll_of_wirings(graph, windows, wirings, BATCH, f"{name} {fraction:g}").mean(0)
            rows.append({"order": name, "fraction": fraction, **difference(nll, whole)})
    pairs = [(source, target) for source in range(sizes[0]) for target in range(source + 1, sizes[0])]
    cut = nll_of_wirings(graph, windows, [without_layer_pair(*sizes, *pair) for pair in pairs], BATCH, "layer pairs")
    heads = nll_of_wirings(
        graph, windows, [without_head(*sizes, node) for node in range(np.prod(sizes))], BATCH, "heads"
    )
    p_pairs, p_heads = (holm(t_test_p((nll - whole).T)) for nll in (cut, heads))
    return {
        "removal": rows,
        "removal_layer_pairs": [
            {"source": source, "target": target, **difference(nll, whole), "p_holm": float(p)}
            for (source, target), nll, p in zip(pairs, cut, p_pairs, strict=True)
        ],
        "removal_heads": [
            {"layer": node // sizes[1], "head": node % sizes[1], **difference(nll, whole), "p_holm": float(p)}
            for node, (nll, p) in enumerate(zip(heads, p_heads, strict=True))
        ],
    }


def difference(nll: np.ndarray, whole: np.ndarray) -> dict[str, float | int]:
    """NLL [n] less that at A = 1, with its interval."""
    found = paired_difference(nll, whole)
    return {"difference": found.mean, "low": found.low, "high": found.high, "n": found.n}


def summarise(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many single removals make NLL better or worse, after correction for their number."""
    found = [corrected_verdict(row["difference"], row["p_holm"]) for row in rows]
    return {words.replace(" ", "_"): found.count(words) for words in ("better", "worse", "no difference shown")}


def followed_windows(documents: np.ndarray, analysis: Analysis) -> list[int]:
    """Windows that the next one continues, evenly spaced: both are wholly within the same document.

    Raises:
        DynarouteError: there are fewer than two.
    """
    followed = np.flatnonzero((documents[:-1] >= 0) & (documents[:-1] == documents[1:]))
    number = min(analysis.oracle_windows, len(followed))
    if number < 2:
        found = f"{len(followed)} windows of the test split are followed by one of their document"
        raise DynarouteError(f"analysis.oracle_windows = {analysis.oracle_windows}: {found}, and two are needed")
    return [int(followed[i * len(followed) // number]) for i in range(number)]


def optimise(graph: DagForward, windows: Windows, own: list[int], analysis: Analysis) -> list[dict[str, Any]]:
    """Gates optimised on a window each, scored on it, on the window after it, and on another of these windows."""
    number = len(own)
    gates = optimise_gates(graph, Selection(windows, own), analysis.oracle_steps, analysis.oracle_lr, BATCH)
    open_gates = dag_mask(graph.num_layers, graph.num_heads).float().expand_as(gates)
    texts = {"same": own, "next": [window + 1 for window in own], "other": own[number // 2 :] + own[: number // 2]}
    rows = []
    for text, indices in texts.items():
        scored = Selection(windows, indices)
        _, targets = scored.batch(range(number))
        nll = {}
        for name, adjacency in (("oracle", gates), ("baseline", open_gates)):
            sums, counts = sequence_nll(wired_nll(graph, scored, adjacency, BATCH), targets)
            nll[name] = sums / counts
        for index, window in enumerate(own):
            row = {"window": window, "text": text, "scored_window": indices[index]}
            rows.append(row | {f"nll_{name}": float(values[index]) for name, values in nll.items()})
    return rows


def summarise_oracle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The oracle's paired difference to A = 1 on each text."""
    found = {}
    for text in ("same", "next", "other"):
        own = [row for row in rows if row["text"] == text]
        gain = paired_difference([row["nll_oracle"] for row in own], [row["nll_baseline"] for row in own])
        found[text] = {**gain._asdict(), "verdict": verdict(gain)}
    return found


if __name__ == "__main__":
    run(main, __doc__)
