"""How sensitive the base's NLL is to its wiring: X3 of the published report. No predictor takes part.

    python stages/dagformer/analyze_sensitivity.py

Everything is on windows of the test split, whose documents no training has read, evenly chosen over documents. Orders
of removal come from gradients on one half of them and are scored on the other half.

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/base
Writes  reports/dagformer/sensitivity.json        flatness at A = 1, what was removed, the oracle, checks
        reports/dagformer/gate_gradients.csv      a row for each layer pair: gates; mean, size, spread and sign
            consistency of their gradients, see `describe_gradients`, means over gates; helpful, harmful, see `flatness`
        reports/dagformer/removal.csv             a row for each order and fraction of edges removed
        reports/dagformer/removal_layer_pairs.csv, removal_heads.csv   a row for each layer pair, and each head
            difference, low, high: mean over documents of NLL less that at A = 1, its 95 % t interval; n (windows),
            documents; p_corrected, see `westfall_young`, among the rows of the file; detectable, the difference that
            so corrected a test would show four times in five; draws, of a random order
        reports/dagformer/oracle.csv              a row for each window and text that its optimised gates are scored on:
            same, the window itself; next, the one after it; other, one of another document
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynaroute.analysis.domains import evenly, windows_of_documents
from dynaroute.analysis.nll import sequence_nll, wired_nll
from dynaroute.analysis.sensitivity import (
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
from dynaroute.analysis.statistics import (
    SIGNIFICANT,
    bootstrap_ratio,
    compare,
    corrected_verdict,
    group_means,
    minimum_detectable_difference,
    paired_difference,
    westfall_young,
)
from dynaroute.config import Analysis, Settings
from dynaroute.dagformer.base import load_base
from dynaroute.dagformer.gates import dag_mask, layer_distance
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Selection
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import sha256, write_csv, write_json
from dynaroute.pipeline.stage import run

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
    mean_gradient = group_means(gradients, groups).mean(0)
    removal, orders = remove(graph, scored, documents[scored.indices], mean_gradient, analysis, settings.seed)
    oracle = optimise(graph, windows, followed, documents, analysis)

    write_csv(REPORTS / "gate_gradients.csv", list(gradients_by_layer_pair(graph, gradients, groups)))
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
            "removal": {"n": len(scored), "orders": orders} | {
                name: summarise(removal[f"removal_{name}"]) for name in ("layer_pairs", "heads")
            },
            "oracle": {"steps": analysis.oracle_steps, "lr": analysis.oracle_lr}
            | summarise_oracle(oracle, settings.seed),
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
    """Windows for gradients and windows for removals, of every other document, evenly chosen over documents.

    Args:
        documents: which document each window is wholly within; -1 where none.
        analysis: how many of each are wanted.

    Raises:
        DynarouteError: there are fewer than two documents for one of them.
    """
    pools = [np.flatnonzero(documents == document).tolist() for document in np.unique(documents[documents >= 0])]
    chosen = []
    for parity, most in enumerate((analysis.gradient_windows, analysis.removal_windows)):
        own = pools[parity::2]
        if len(own) < 2:
            found = f"too few documents of the test split hold a whole window ({len(pools)})"
            raise DynarouteError(f"analysis: {found}: raise corpora's split.test, or lower dagformer.seq_len")
        number = min(most, sum(map(len, own)))
        chosen.append(list(chain.from_iterable(evenly(own, number))))
    return chosen


def gradients_by_layer_pair(
    graph: DagForward, gradients: np.ndarray, documents: np.ndarray
) -> Iterator[dict[str, Any]]:
    """A row for each layer pair: what the gradients of its gates are."""
    found, layers = describe_gradients(gradients, documents), graph.num_layers
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
    graph: DagForward,
    windows: Selection,
    documents: np.ndarray,
    mean_gradient: np.ndarray,
    analysis: Analysis,
    seed: int,
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """NLL without edges by order and fraction, without each layer pair's, and without each head's.

    Returns:
        Rows by file; and by how much each other order differs from the random one.
    """
    sizes = graph.num_layers, graph.num_heads
    whole = nll_of_wirings(graph, windows, [dag_mask(*sizes).float()], BATCH, "no edge removed")[0]
    orders = removal_orders(mean_gradient, analysis.random_removals, seed)
    steps = [(name, fraction) for name in orders for fraction in analysis.removal_fractions]
    without = {}  # NLL [n] by order and fraction, mean over draws
    for name, fraction in steps:
        wirings = [without_edges(*sizes, order[: round(fraction * len(order))]) for order in orders[name]]
        without[name, fraction] = nll_of_wirings(graph, windows, wirings, BATCH, f"{name} {fraction:g}").mean(0)
    pairs = [(source, target) for source in range(sizes[0]) for target in range(source + 1, sizes[0])]
    cut = nll_of_wirings(graph, windows, [without_layer_pair(*sizes, *pair) for pair in pairs], BATCH, "layer pairs")
    heads = nll_of_wirings(
        graph, windows, [without_head(*sizes, node) for node in range(np.prod(sizes))], BATCH, "heads"
    )
    by_order = [{"order": name, "fraction": fraction, "draws": len(orders[name])} for name, fraction in steps]
    by_pair = [{"source": source, "target": target} for source, target in pairs]
    by_head = [{"layer": node // sizes[1], "head": node % sizes[1]} for node in range(len(heads))]
    rows = {
        "removal": differences(by_order, np.stack(list(without.values())) - whole, documents, seed),
        "removal_layer_pairs": differences(by_pair, cut - whole, documents, seed),
        "removal_heads": differences(by_head, heads - whole, documents, seed),
    }
    others = [step for step in steps if step[0] != "random" and step[1] < 1]  # without any edge there is no order
    against = [without[step] - without["random", step[1]] for step in others]
    names = [{"order": name, "fraction": fraction} for name, fraction in others]
    return rows, differences(names, np.stack(against), documents, seed) if others else []


def differences(
    names: list[dict[str, Any]], values: np.ndarray, documents: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """A row for each of m differences of NLL, [m, n], by document, corrected for the m of them; see the head."""
    corrected = westfall_young(values.T, documents, seed)
    rows = []
    for name, own, p in zip(names, group_means(values.T, documents).T, corrected, strict=True):
        none = np.zeros_like(own)
        found = paired_difference(own, none)
        row = name | {"difference": found.mean, "low": found.low, "high": found.high}
        row |= {"n": values.shape[1], "documents": found.n, "p_corrected": float(p)}
        confidence = 1 - SIGNIFICANT / len(values)  # Bonferroni's: the correction made here asks for no more
        rows.append(row | {"detectable": minimum_detectable_difference(own, none, confidence=confidence)})
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, int | float]:
    """How many single removals make NLL better or worse, after correction for their number, and what could be shown."""
    found = [corrected_verdict(row["difference"], row["p_corrected"]) for row in rows]
    counts = {words.replace(" ", "_"): found.count(words) for words in ("better", "worse", "no difference shown")}
    return counts | {"detectable": float(np.median([row["detectable"] for row in rows]))}


def followed_windows(documents: np.ndarray, analysis: Analysis) -> list[int]:
    """Windows that the next one continues, evenly chosen over documents: both are wholly within the same document.

    Raises:
        DynarouteError: there are such windows in fewer than two documents.
    """
    followed = np.flatnonzero((documents[:-1] >= 0) & (documents[:-1] == documents[1:]))
    pools = [followed[documents[followed] == document].tolist() for document in np.unique(documents[followed])]
    if len(pools) < 2:
        found = f"{len(pools)} documents of the test split hold two windows in a row"
        raise DynarouteError(f"analysis.oracle_windows = {analysis.oracle_windows}: {found}, and two are needed")
    return list(chain.from_iterable(evenly(pools, min(analysis.oracle_windows, len(followed)))))


def optimise(
    graph: DagForward, windows: Windows, own: list[int], documents: np.ndarray, analysis: Analysis
) -> list[dict[str, Any]]:
    """Gates optimised on a window each, scored on it, on the window after it, and on one of another document."""
    number = len(own)
    others = [own[index] for index in other_texts(documents[own])]
    gates = optimise_gates(graph, Selection(windows, own), analysis.oracle_steps, analysis.oracle_lr, BATCH)
    open_gates = dag_mask(graph.num_layers, graph.num_heads).float().expand_as(gates)
    texts = {"same": own, "next": [window + 1 for window in own], "other": others}
    rows = []
    for text, indices in texts.items():
        scored = Selection(windows, indices)
        _, targets = scored.batch(range(number))
        nll = {}
        for name, adjacency in (("oracle", gates), ("baseline", open_gates)):
            sums, counts = sequence_nll(wired_nll(graph, scored, adjacency, BATCH), targets)
            nll[name] = sums / counts
        for index, window in enumerate(own):
            row = {"window": window, "document": int(documents[window]), "text": text, "scored_window": indices[index]}
            rows.append(row | {f"nll_{name}": float(values[index]) for name, values in nll.items()})
    return rows


def other_texts(documents: np.ndarray) -> list[int]:
    """For each of n windows one of the n that is of another document, far off in their order where that can be.

    Where one document has more than half of the windows, their partners are shared by them evenly.

    Args:
        documents: [n], which document each is of; at least two, as `followed_windows` sees to.
    """
    partners = []
    for index, document in enumerate(documents):
        others = np.flatnonzero(documents != document)
        partners.append(int(others[(index - len(documents) // 2) % len(others)]))
    return partners


def summarise_oracle(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The oracle's difference to A = 1 on each text, and the share of its gain that the following text keeps."""
    texts = ("same", "next", "other")
    by_text = [[row for row in rows if row["text"] == text] for text in texts]
    documents = np.array([row["document"] for row in by_text[0]])
    gains = np.array([[row["nll_oracle"] - row["nll_baseline"] for row in own] for own in by_text])  # [texts, n]
    found = differences([{"text": text} for text in texts], gains, documents, seed)
    same, after, _ = gains
    carried = bootstrap_ratio(after, same, documents, seed)._asdict() if same.sum() < 0 else None
    return {row.pop("text"): row for row in found} | {"carried_over": carried}


if __name__ == "__main__":
    run(main, __doc__)
