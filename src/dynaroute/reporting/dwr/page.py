"""What reports/dwr.md and its part of reports/summary.md show. The sentences are in templates/.

Nothing here depends on time, machine or measured speed, so the pages have the same bytes on every run. Published
numbers appear in columns headed "published" and in quotations that begin with "Published", and nowhere else.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynaroute.config import Settings
from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.results import (
    DATA,
    REFERENCE,
    Cached,
    Corpus,
    Training,
    read_cached,
    read_corpus,
    read_locality,
    read_runs,
    read_training,
)
from dynaroute.reporting.inputs import Record, file_size, read_record
from dynaroute.reporting.tables import NONE, fmt, interval, outcome, shared_text

if TYPE_CHECKING:
    import pandas as pd

SHOWN = ("reference", "prior", "recipe", "recipe_prior")  # settings whose routing by other means is shown too


class Results(NamedTuple):
    """Everything that the report is made from."""

    training: Training  # of the main model; so is `cached`
    corpus: Corpus
    cached: Cached
    runs: list[Record]  # beside the main model, the reference first
    locality: "pd.DataFrame | None"  # the benchmark of training for the cache; None if it was not run
    larger: "pd.DataFrame | None"  # the same at the size of the main model
    reference: Record  # the published numbers


def read_results(settings: Settings) -> Results:
    """Reads everything. Raises DynarouteError if a file is missing or damaged."""
    training, cached, runs = read_training(), read_cached(), read_runs(settings)
    locality = read_locality("reference", runs[0]["run"]), read_locality("larger")
    return Results(training, read_corpus(training.run), cached, runs, *locality, read_record(REFERENCE)["dwr"])


def values(results: Results) -> dict[str, Any]:
    """What the templates show."""
    (run, training, curve, router), corpus, cached, runs, locality, larger, published = results
    load, seeds = findings.relative_load(router), findings.differing_in(runs, "seed")
    curves = [findings.curve(one) for one in seeds]
    norms = (findings.gate_norms(one, "max")[-1] - findings.gate_norms(one, "min")[-1] for one in seeds)
    spreads, theirs = np.stack([*norms]), np.array([[row["spread"] for row in published["gate_norms"]["rows"]]])
    made, hits = checks(results), cached.hits
    third, rates = cached.simulation["capacity_nearest_a_third"], cached.simulation["hit_rate"]
    shares = hits[hits["per_layer"] & (hits["capacity"] == third)].set_index("policy")["hit_rate"]
    losses = curves[0]["validation_loss"]
    best = ["best" if loss == losses.min() else None for loss in losses]
    return {
        "run": run,
        "summary": training,
        "published": published,
        "corpus": corpus,
        "shared": shared_text(corpus.tokens["splits"]["test"]),
        "cached": cached,
        "third": third,
        "rates": rates,
        "best_policy": max((policy for policy in rates if policy != "min"), key=rates.__getitem__),
        "lru_per_layer": shares.get("lru"),
        "load": load,
        "files": {name: file_size(DATA / f"train/{name}.safetensors") for name in ("best", "last")},
        "reference": runs[0],
        "runs": runs,
        "seeds": seeds,
        "swept": findings.sweep(runs),
        "courses": [findings.course(one) for one in curves],
        "largest_rise": {name: curves[0][f"{name}_loss"].diff().max() for name in ("train", "validation")},
        "depth": findings.over_seeds(findings.depth_slopes(spreads)) if spreads.shape[1] > 1 else None,
        "published_slope": findings.depth_slopes(theirs)[0],
        "weakest": max(runs, key=lambda one: one["test_loss"] - one["test_unigram_entropy"]),
        "failed": [check["check"] for check in made if "failed" in check["outcome"]],
        "locality": _by_setting(locality),
        "larger": larger is not None,
        "rows": {
            "configuration": _configuration(results),
            "epochs": curves[0].assign(status=best),
            "gates": list(_gates(runs[0], spreads)),
            "routers": _routers(curve, router, load, run["config"]["top_k"]),
            "runs": list(_runs(runs)),
            "locality": (shown := [] if locality is None else list(_locality(locality))),
            "ppl": {row["name"]: row["ppl"] for row in shown},
            "larger": [] if larger is None else list(_locality(larger[larger["routing"] == "exact"])),
            "checks": made,
            "splits": [
                {"split": name, **split, **{("of", source): n for source, n in split["tokens_by_source"].items()}}
                for name, split in corpus.tokens["splits"].items()
            ],
        },
        "by_source": [(("of", source), f"tokens of {source}") for source in corpus.tokens["sources"]],
    }


def summary(results: Results) -> dict[str, float]:
    """The numbers that people ask for first."""
    training, found = results.training.summary, values(results)
    return {
        "validation_loss": training["best_validation_loss"],
        "validation_perplexity": math.exp(training["best_validation_loss"]),
        "test_perplexity": math.exp(training["test_loss"]),
        **{f"hit_rate_{policy}": found["rates"].get(policy) for policy in ("lru", "next_use", "token_path", "min")},
        "hit_rate_lru_per_layer": found["lru_per_layer"],
        "failed_checks": len(found["failed"]),
    }


def checks(results: Results) -> list[dict[str, str]]:
    """The outcome of every check that a stage made."""
    cached = results.cached
    records = {
        "train_dwr": results.training.summary,
        "export_experts": cached.export,
        "benchmark_cache": cached.summary,
        "simulate_cache": cached.simulation,
    }
    return [
        {"outcome": outcome(passed), "check": name.replace("_", " "), "stage": f"`{stage}`"}
        for stage, record in records.items()
        for name, passed in record["checks"].items()
    ]


def _configuration(results: Results) -> list[dict[str, Any]]:
    """Settings and sizes of the main model and of the reference run, beside the published ones."""
    (run, training, *_), corpus, _, (reference, *_), _, _, published = results
    config, identity = run["config"], run["identity"]
    main = {**config, **identity["dwr"], **identity["dwr"]["training"], **training, "hardware": identity["device"]}
    main["corpus"] = corpus.place.get("name") or corpus.place.get("path") or f"{corpus.name} (section 9)"
    main["tokenizer"] = _tokenizer_name(corpus)
    main["active_parameters"] -= config["vocab_size"] * config["d_model"]
    runs = {"tokenizer": None, "active_parameters": None, "hardware": identity["device"], **reference}
    runs |= {**reference["settings"], **reference["settings"]["training"]}
    columns = {"main": main, "runs": runs, "theirs": published["configuration"]}
    shown = {key: _settings(of) for key, of in columns.items()}
    return [{"parameter": label, **{key: of[label] for key, of in shown.items()}} for label in shown["main"]]


def _settings(of: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text, in the same words for ours and the published ones."""
    beta_1, beta_2 = of["betas"]
    return {
        "Corpus": of["corpus"],
        "Tokenizer, vocabulary": f"{of['tokenizer']}, {of['vocab_size']:,}" if of["tokenizer"] else NONE,
        "Tokens of training text": fmt(of["training_tokens"]),
        "Parameters": fmt(of["parameters"]),
        "Active per token, without embedding": fmt(of["active_parameters"]),
        "Steps": fmt(of["steps"]),
        "Hardware": of["hardware"],
        "d_model": fmt(of["d_model"]),
        "d_ff of an expert": fmt(of["d_ff"]),
        "Layers, heads": f"{of['num_layers']}, {of['num_heads']}",
        "Experts per layer, top_k": f"{of['num_experts']}, {of['top_k']}",
        "Expert capacity factor": fmt(of["capacity_factor"]),
        "Sequence length, batch": f"{of['max_seq_len']}, {of['batch_size']}",
        "AdamW betas, weight decay": f"{beta_1:g}, {beta_2:g}, {of['weight_decay']:g}",
        "Learning rate": f"{of['lr']:g}, {of['warmup_steps']} warm-up steps, cosine to {of['min_lr']:g}",
        "Gradient clipping": f"{of['clip_norm']:g}",
        "Dropout": f"{of['dropout']:g}",
        "Balance coefficient λ": f"{of['balance_coefficient']:g}",
        "Epochs": f"{of['epochs']:g}",
        "Precision": of["precision"],
        "Early stopping after validations": fmt(of["early_stopping_patience"]),
    }


def _tokenizer_name(corpus: Corpus) -> str:
    tokenizer = corpus.tokens["tokenizer"]
    names = {"bpe": "byte-level BPE, trained on the corpus", "gpt2": "GPT-2 BPE (tiktoken)"}
    return names.get(tokenizer["kind"]) or tokenizer["path"]


def _gates(reference: Record, spreads: np.ndarray) -> Iterable[dict[str, Any]]:
    """Gate norms after the last epoch, a row for each layer."""
    least, most, mean = (findings.gate_norms(reference, measure) for measure in ("min", "max", "mean"))  # [rows, L]
    for layer, spread in enumerate(spreads.T):
        norms = {"min": least[-1, layer], "max": most[-1, layer], "mean": mean[-1, layer], "spread": spread[0]}
        initial, seeds = most[0, layer] - least[0, layer], interval(findings.over_seeds(spread), 3, "")
        yield {"layer": layer, "initial": initial, **norms, "seeds": seeds}


def _routers(curve: "pd.DataFrame", router: "pd.DataFrame", load: "pd.Series", top_k: int) -> "pd.DataFrame":
    """Gate norms, load and balance loss of each layer of the main model's best checkpoint."""
    best = curve.loc[curve["validation_loss"].idxmin()]
    rows = router.groupby("layer")["gate_norm"].agg(["min", "max", "mean"])
    rows = rows.assign(least=load.groupby("layer").min(), most=load.groupby("layer").max()).reset_index()
    balance = [best[f"validation_balance_layer{layer}"] for layer in rows["layer"]]
    return rows.assign(balance=balance, as_trained=[value * top_k for value in balance])


def _runs(runs: list[Record]) -> Iterable[dict[str, Any]]:
    """A row for each run, and one for uniform routing, which has hit rates alone."""
    for run in runs:
        last = findings.curve(run).iloc[-1]
        changed = ", ".join(f"{key} {fmt(value)}" for key, value in findings.changes(run, runs[0]).items())
        gap = last["validation_loss"] - last["train_loss"]
        yield {**run, **run["hit_rate"], "changes": changed or NONE, "gap": gap}
    unknown = dict.fromkeys(("changes", "epochs", "gap", "test_loss", "smallest_load", "largest_load"))
    yield {**unknown, "name": "uniform routing", **runs[0]["uniform_hit_rate"]}


def _by_setting(table: "pd.DataFrame | None") -> dict[str, dict[str, Record]]:
    """The rows of the benchmark of training for the cache by setting and routing; empty without it."""
    found: dict[str, dict[str, Record]] = {}
    for row in [] if table is None else table.to_dict("records"):
        found.setdefault(row["setting"], {})[row["routing"]] = row
    return found


def _locality(table: "pd.DataFrame") -> Iterable[dict[str, Any]]:
    """A row for each setting, and for some of them, for each other routing."""
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        if row["routing"] == "exact" or row["setting"] in SHOWN:
            name = row["setting"] if row["routing"] == "exact" else f"{row['setting']}, {row['routing']}"
            known = row["perplexity"] is not None
            means = {part: row[f"perplexity{end}"] for part, end in (("mean", ""), ("low", "_low"), ("high", "_high"))}
            goal = {True: "yes", False: "no"}.get(row["reaches_goal"])
            yield {**row, "name": name, "ppl": interval(means, 1, "") if known else None, "goal": goal}
