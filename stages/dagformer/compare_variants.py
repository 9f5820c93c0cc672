"""Every paired difference that the DAGFormer report claims, with the statistics under it.

    python stages/dagformer/compare_variants.py

Families, each corrected for its own number of tests by `settled_westfall_young`:
    baseline    every variant against the base with all gates at one
    direction   all variants on the frozen base, averaged window by window, and P1 over its seeds likewise, against the
                base with all gates at one: whether what was trained has NLL on one side of it on the whole
    reference   every ablation against P1, at its own budget where that was run, but for C1
    control     P1 and its other seeds against C1, one topology for all texts
    joint       J1, whose base was trained jointly, against J0, the same base trained on with gates held open

Reads   reports/dagformer/<id>/* and data/dagformer/<id>/run.json of every variant in params.yaml;
        data/tokens/<dagformer.corpus> (test), for the document that each window is of
Writes  reports/statistics/comparisons.csv  a row for each comparison, protocol and mode: family, ours, theirs,
            protocol, mode; what `dynaroute.analysis.statistics.compare` gives; p_corrected; p_error, its Monte Carlo
            standard error; verdict, by the rule of `corrected_verdict`
        reports/statistics/seeds.json       seeds, by variant; by protocol and mode: differences, to the baseline, by
            variant; spread, their standard deviation; mean, low, high, n of the t interval over seeds
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dynaroute.analysis.domains import main_documents
from dynaroute.analysis.statistics import (
    compare,
    corrected_verdict,
    paired_difference,
    settled_westfall_young,
)
from dynaroute.config import Settings
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.pipeline.artifacts import write_csv, write_json
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dagformer.results import (
    CONTROL,
    MODES,
    PROTOCOLS,
    Pool,
    Results,
    Variant,
    read_results,
)

REPORTS = Path("reports/statistics")


def main(settings: Settings) -> None:
    """Compares, corrects, and writes."""
    results = read_results(settings)
    shards = TokenShards(Path("data/tokens") / settings.dagformer.corpus, "test")
    windows = results.main.windows.groupby("protocol").get_group(PROTOCOLS[0])["window"].tolist()
    documents = main_documents(shards, settings.dagformer.seq_len, windows)
    rows = []
    for family, members in families(results).items():
        own = list(compare_family(family, members, documents, settings.seed))
        differences = np.stack([nll[0] - nll[1] for _, nll in own], axis=1)  # [n, tests]
        corrected = settled_westfall_young(differences, documents, settings.seed)
        for (row, _), p, error in zip(own, *map(np.ndarray.tolist, corrected), strict=True):
            words = corrected_verdict(row["mean"], p, error)
            rows.append(row | {"p_corrected": p, "p_error": error, "verdict": words})
    write_csv(REPORTS / "comparisons.csv", rows)
    write_json(REPORTS / "seeds.json", over_seeds(results.seeds()))


def families(results: Results) -> dict[str, list[tuple[Variant | Pool, Variant | None]]]:
    """Pairs of variants to compare, by family; None is the baseline. Every question is in one family alone."""
    found: dict[str, list[tuple[Variant | Pool, Variant | None]]] = {
        "baseline": [(variant, None) for variant in results.variants.values()],
        "direction": [(pool, None) for pool in results.pools()],
        "reference": [(one, results.peer(one)) for one in results.ablations() if one.name != CONTROL],
    }
    found["reference"] = [(ours, theirs) for ours, theirs in found["reference"] if theirs is not None]
    if CONTROL in results.variants:
        control = results.variants[CONTROL]
        found["control"] = [
            (seed, control) for seed in results.seeds() if seed.knobs["steps"] == control.knobs["steps"]
        ]
    if results.joint is not None:
        found["joint"] = [results.joint]
    return {family: members for family, members in found.items() if members}


def compare_family(
    family: str, members: list[tuple[Variant | Pool, Variant | None]], documents: np.ndarray, seed: int
) -> Iterator[tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]]:
    """A row for each pair, protocol and mode, and the NLL [n] of both."""
    for ours, theirs in tqdm(members, desc=family, unit="pair", disable=None):
        names = {"family": family, "ours": ours.name, "theirs": "baseline" if theirs is None else theirs.name}
        for protocol in PROTOCOLS:
            for mode in MODES:
                mine = ours.window_nll(mode, protocol)
                others = ours.window_nll("baseline", protocol) if theirs is None else theirs.window_nll(mode, protocol)
                row = names | {"protocol": protocol, "mode": mode}
                yield row | compare(mine, others, documents, seed)._asdict(), (mine, others)


def over_seeds(seeds: list[Variant]) -> dict[str, Any]:
    """How much of a variant's difference to the baseline is the luck of its seed. The baseline has no seed."""
    found: dict[str, Any] = {"seeds": {variant.name: variant.knobs["seed"] for variant in seeds}}
    if len(seeds) < 2:
        return found
    for protocol in PROTOCOLS:
        found[protocol] = {}
        for mode in MODES:
            differences = {variant.name: variant.to_baseline(mode, protocol).mean for variant in seeds}
            values = np.array(list(differences.values()))
            mean = paired_difference(values, np.zeros_like(values))
            found[protocol][mode] = {
                "differences": differences,
                "spread": float(values.std(ddof=1)),
                **mean._asdict(),
            }
    return found


if __name__ == "__main__":
    run(main, __doc__)
