"""Whether a variant wires different texts differently, by domain as well, and what that is worth: X1 and X2.

    python stages/analyze_topology.py P1

Everything is on windows of the test split, whose documents no training has read.

Reads   data/tokens/<dagformer.corpus> (test), data/dagformer/base, data/dagformer/embeddings, data/dagformer/<id>,
        data/eval/<id>, reports/dagformer/<id>/nll.csv
Writes  reports/dagformer/<id>/topology.json   run, variant, n (windows), checks, and
            variation: by protocol and mode, see `topology.variation`
            same_text: by mode, whether the wirings of a whole window and of its prefix are alike; `same_text_test`
            swapped: by protocol, soft NLL of texts under their own wiring less that under other texts'
            reading: by mode, all on the tokens after the prefix: NLL less the baseline's when the encoder reads the
                whole window, when it reads the prefix, and the one less the other
            domains: null if `domain_windows` draws none; else sources, windows and documents; by mode separation
                (test) and mean_distances; the probe of soft gates and of the text vectors (tests); layer_pairs, for
                each the share of its mean gate's variance that lies between sources (test), and the means by source
        reports/dagformer/<id>/swaps.csv       a row for each protocol and window
        data/analysis/<id>/wirings.safetensors a checkpoint of ours, of soft gates: variance over texts [N, N];
            distances of all pairs of texts; same_text, of each whole window to its own prefix; mean_by_source [C, N, N]
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dynaroute.artifacts import write_csv, write_json
from dynaroute.config import Settings
from dynaroute.dagformer.base import load_base
from dynaroute.dagformer.encoders import load_embeddings
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.dagformer.trained import load_predictor
from dynaroute.data.shards import TokenShards, Windows
from dynaroute.data.windows import Subset
from dynaroute.errors import DynarouteError
from dynaroute.evaluation.domains import Domains, DomainWindows, domain_windows, main_documents
from dynaroute.evaluation.nll import Wiring, read_nll, sequence_nll, wire, wired_nll
from dynaroute.evaluation.statistics import compare, holm
from dynaroute.evaluation.topology import by_layer_pair, jaccard_distances, same_text_test, variation
from dynaroute.stage import run
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint

DATA, REPORTS, EVALUATED = Path("data/dagformer"), Path("reports/dagformer"), Path("data/eval")
ANALYSED = Path("data/analysis")
BATCH = 8  # windows. A constant: float sums depend on it
SPLITS = {"window": "test", "prefix": "test_prefix"}  # of the embeddings, by protocol
MODES = ("soft", "hard")


def main(settings: Settings, name: str) -> None:
    """Wires the held-out texts and those of each domain, and writes what was found."""
    torch.set_num_threads(settings.num_threads)
    dagformer, analysis = settings.dagformer, settings.analysis
    record, predictor = load_predictor(DATA / name, settings.device)
    shards = TokenShards(Path("data/tokens") / dagformer.corpus, "test")
    windows = Windows(shards, dagformer.seq_len, keep_tail=False)
    held_out = Subset(windows, dagformer.eval_windows)
    embeddings = load_embeddings(DATA / "embeddings/evaluation")
    tau = predictor.variant.tau_final
    wirings = {
        protocol: wire(predictor, torch.from_numpy(embeddings[split]), tau, BATCH) for protocol, split in SPLITS.items()
    }
    stored, state = load_checkpoint(EVALUATED / name / "gates.safetensors")
    valid = dag_mask(predictor.num_layers, predictor.num_heads)
    checks = {
        "wirings_are_those_that_were_evaluated": state["run"] == record["run"]
        and all(torch.equal(wirings[protocol].logits[:, valid], stored[f"{protocol}.logits"]) for protocol in SPLITS)
    }
    own_base = DATA / name / "base" if predictor.variant.base_lr > 0 else DATA / "base"
    graph = DagForward(load_base(own_base, settings.device), predictor.variant.input_norm)
    evaluated = {protocol: read_nll(REPORTS / name / "nll.csv", protocol) for protocol in SPLITS}
    documents = main_documents(shards, windows.seq_len, list(held_out.indices))
    swaps = score_swaps(graph, held_out, wirings, evaluated, dagformer.prefix_tokens, analysis.swaps)
    sets = {mode: {protocol: _gates(wirings[protocol], mode, valid) for protocol in SPLITS} for mode in MODES}
    report = {
        "run": record["run"],
        "variant": name,
        "n": len(held_out),
        "variation": {
            protocol: {mode: variation(sets[mode][protocol]) for mode in MODES} for protocol in SPLITS
        },
        "same_text": {
            mode: same_text_test(*sets[mode].values(), analysis.permutations, settings.seed)._asdict()
            for mode in MODES
        },
        "swapped": {
            protocol: compare(own["own"], own["other"], documents, settings.seed)._asdict()
            for protocol, own in swaps.items()
        },
        "reading": reading(graph, held_out, wirings, evaluated, documents, dagformer.prefix_tokens, settings.seed),
    }  # fmt: skip
    drawn = domain_windows(shards, windows.seq_len, analysis.domain_windows)
    tensors = dict(zip(("distances", "same_text"), distances(**sets["soft"]), strict=True))
    tensors["variance"] = wirings["window"].soft.var(0, correction=0)
    report["domains"] = None
    if drawn is not None:
        folder = DATA / "embeddings/domains"
        vectors = load_embeddings(folder).get("domains", np.empty(0))
        if len(vectors) != len(drawn.windows):
            found = f"{len(vectors)} texts of domains, not {len(drawn.windows)}"
            raise DynarouteError(f"{folder}: {found}: run stages/encode_windows.py again")
        vectors = torch.from_numpy(vectors)
        report["domains"], tensors["mean_by_source"] = analyze_domains(settings, predictor, drawn, vectors)
    write_csv(
        REPORTS / name / "swaps.csv",
        [
            {"protocol": protocol, "window": window, "document": int(document)}
            | {f"nll_{wiring}": float(values[index]) for wiring, values in own.items()}
            for protocol, own in swaps.items()
            for index, (window, document) in enumerate(zip(held_out.indices, documents, strict=True))
        ],
    )
    state = {"run": record["run"], "variant": name, "num_heads": predictor.num_heads}
    state["sources"] = drawn.sources if drawn is not None else []
    save_checkpoint(ANALYSED / name / "wirings.safetensors", tensors, state)
    write_json(REPORTS / name / "topology.json", report | {"checks": checks})


def distances(window: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pairs of different texts, [n(n-1)/2], and of each whole window to its own prefix, [n]."""
    first, second = torch.triu_indices(len(window), len(window), 1)
    return jaccard_distances(window, window)[first, second], jaccard_distances(window, prefix).diagonal()


def shifts(n: int, number: int) -> list[int]:
    """By how much to shift n texts so that each meets `number` others, as far apart as can be.

    With fewer than n of them, as the settings ask, they are at least one step apart, after 0 and before n: so they
    differ, and no text meets itself.
    """
    return [n * (index + 1) // (number + 1) for index in range(number)]


def score_swaps(
    graph: DagForward,
    windows: Subset,
    wirings: dict[str, Wiring],
    evaluated: dict[str, dict[str, np.ndarray]],
    prefix_tokens: int,
    number: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Soft NLL of every window under its own wiring and, on average, under those of `number` other texts."""
    n = len(windows)
    _, targets = windows.batch(range(n))
    found = {}
    with tqdm(total=len(wirings) * number, desc="swaps", unit="wiring", disable=None) as progress:
        for protocol, wiring in wirings.items():
            others = []
            for shift in shifts(n, number):
                other = wiring.soft.roll(shift, 0)
                if torch.equal(other, wiring.soft):  # one wiring for all texts
                    others.append(evaluated[protocol]["soft"])
                else:
                    first = prefix_tokens - 1 if protocol == "prefix" else 0
                    sums, counts = sequence_nll(wired_nll(graph, windows, other, BATCH), targets, first)
                    others.append((sums / counts).numpy())
                progress.update()
            found[protocol] = {"own": evaluated[protocol]["soft"], "other": np.mean(others, axis=0)}
    return found


def reading(
    graph: DagForward,
    windows: Subset,
    wirings: dict[str, Wiring],
    evaluated: dict[str, dict[str, np.ndarray]],
    documents: np.ndarray,
    prefix_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """How much of a gain is that the encoder has read what is scored: NLL after the prefix, read and not read."""
    _, targets = windows.batch(range(len(windows)))
    not_read = evaluated["prefix"]
    found = {}
    for mode in MODES:
        adjacency = getattr(wirings["window"], mode)
        if torch.equal(adjacency, getattr(wirings["prefix"], mode)):  # one wiring for all texts
            read = not_read[mode]
        else:
            sums, counts = sequence_nll(wired_nll(graph, windows, adjacency, BATCH), targets, prefix_tokens - 1)
            read = (sums / counts).numpy()
        pairs = {"read": (read, not_read["baseline"]), "not_read": (not_read[mode], not_read["baseline"])}
        pairs["read_minus_not_read"] = read, not_read[mode]
        found[mode] = {key: compare(*pair, documents, seed)._asdict() for key, pair in pairs.items()}
    return found


def analyze_domains(
    settings: Settings, predictor: StructurePredictor, drawn: DomainWindows, vectors: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """What sources tell about wirings, and the mean soft gates of each, [C, N, N]."""
    valid, heads = dag_mask(predictor.num_layers, predictor.num_heads), predictor.num_heads
    wiring = wire(predictor, vectors, predictor.variant.tau_final, BATCH)
    domains = Domains(drawn.documents, drawn.labels, settings.analysis.permutations, settings.seed)
    found: dict[str, Any] = {
        "sources": drawn.sources,
        "windows_per_source": len(drawn.windows) // len(drawn.sources),
        "documents": np.bincount(drawn.labels).tolist(),
    }
    for mode in MODES:
        gates = _gates(wiring, mode, valid)
        distances = jaccard_distances(gates, gates).numpy()
        found[mode] = {
            "separation": _plain(domains.separation(distances)),
            "mean_distances": domains.mean_distances(distances).tolist(),
        }
    found["probe"] = _plain(domains.probe(_gates(wiring, "soft", valid).numpy()))
    found["text_probe"] = _plain(domains.probe((vectors * predictor.embedding_inverse_std.cpu()).numpy()))
    pairs = [
        (source, target) for source in range(predictor.num_layers) for target in range(source + 1, predictor.num_layers)
    ]
    means = by_layer_pair(wiring.soft, heads).double().numpy()  # [n, L, L]
    values = np.stack([means[:, source, target] for source, target in pairs], axis=1)  # [n, P]
    explained = domains.explained(values)
    adjusted = holm(explained.p)
    source_of = drawn.labels[drawn.documents]
    found["layer_pairs"] = [
        {
            "source": source,
            "target": target,
            "explained": float(explained.observed[index]),
            "chance": float(explained.chance[index]),
            "p": float(explained.p[index]),
            "p_holm": float(adjusted[index]),
            "means": [float(values[source_of == own, index].mean()) for own in range(len(drawn.sources))],
        }
        for index, (source, target) in enumerate(pairs)
    ]
    by_source = [wiring.soft[torch.from_numpy(source_of == c)].mean(0) for c in range(len(drawn.sources))]
    return found, torch.stack(by_source)


def _gates(wiring: Wiring, mode: str, valid: Tensor) -> Tensor:
    """The valid gates of a mode, [n, E]."""
    return getattr(wiring, mode)[:, valid]


def _plain(test: Any) -> dict[str, float]:
    return {key: float(value) for key, value in test._asdict().items()}


if __name__ == "__main__":
    run(main, __doc__, "variant")
