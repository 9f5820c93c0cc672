"""reports/dwr.md: the published report's tables, filled from one run. The sentences stand in templates/dwr.md.

Nothing here depends on time, machine or measured speed, so the page has the same bytes on every run. Published numbers
appear in columns headed "published" and in quotations that begin with "Published", and nowhere else.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.results import (
    DATA,
    REFERENCE,
    Cached,
    Corpus,
    Training,
    read_cached,
    read_corpus,
    read_training,
)
from dynaroute.reporting.inputs import Record, check_same_run, file_size, read_record
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import count, fmt, outcome, shared_text

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = {
    "corpus": "Corpus",
    "tokenizer": "Tokenizer",
    "vocab_size": "Padded vocabulary",
    "d_model": "d_model",
    "d_ff": "d_ff of an expert",
    "num_layers": "Layers",
    "num_heads": "Heads",
    "num_experts": "Experts per layer",
    "top_k": "top_k",
    "capacity_factor": "Capacity factor",
    "max_seq_len": "Sequence length",
    "dropout": "Dropout",
    "balance_coefficient": "Balance coefficient",
    "betas": "AdamW betas",
    "lr": "Learning rate",
    "min_lr": "Learning rate at the end of the cosine",
    "warmup_steps": "Warm-up steps",
    "weight_decay": "Weight decay",
    "clip_norm": "Gradient clipping (norm)",
    "batch_size": "Batch (sequences)",
    "epochs": "Epochs",
    "precision": "Precision",
    "validate_every": "Validation every (steps)",
    "early_stopping_patience": "Early stopping patience (validations)",
}


class Results(NamedTuple):
    """Everything that the report is made from; all of one run."""

    training: Training
    corpus: Corpus
    cached: Cached
    reference: Record  # the published numbers


def read_results() -> Results:
    """Reads everything.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    training, cached = read_training(), read_cached()
    check_same_run(training.run["run"], cached.export)
    return Results(training, read_corpus(training.run), cached, read_record(REFERENCE)["dwr"])


def page(results: Results) -> str:
    """The report as Markdown."""
    (run, training, curve, router), corpus, cached, reference = results
    load, settings = findings.relative_load(router), _settings(results)
    return render(
        "dwr.md",
        {
            "run": run,
            "settings": run["identity"]["dwr"],
            "summary": training,
            "reference": reference,
            "corpus": corpus,
            "cached": cached,
            "best_policy": findings.best_online(cached.simulation["hit_rate"]),
            "rules": findings,
            "best": curve.loc[curve["validation_loss"].idxmin()],
            "last": curve.iloc[-1],
            "load": load,
            "collapsed": int((load < findings.COLLAPSED).sum()),
            "differing": [row["parameter"] for row in settings if row["differs"]],
            "files": {name: file_size(DATA / f"train/{name}.safetensors") for name in ("best", "last")},
            "validations": len(curve),
            "rows": {
                "settings": settings,
                "routers": router.groupby("layer")["gate_norm"]
                .agg(["min", "max", "mean"])
                .assign(least=load.groupby("layer").min(), most=load.groupby("layer").max())
                .reset_index(),
                "balance": _balance(curve, router["layer"].unique(), run["config"]["top_k"]),
                "checks": checks(results),
                "decoding": cached.cells[cached.cells["prefetch"] == "none"],
                "splits": [{"split": name, **split} for name, split in corpus.tokens["splits"].items()],
                "sources": _sources(corpus),
            },
        },
    )


def summary(results: Results) -> dict[str, float]:
    """The numbers that people ask for first."""
    training, simulation, hits = results.training.summary, results.cached.simulation, results.cached.hits
    third = hits["capacity"] == simulation["capacity_nearest_a_third"]
    per_layer = hits[hits["per_layer"] & third & (hits["policy"] == "lru")]["hit_rate"]
    return {
        "validation_loss": training["best_validation_loss"],
        "validation_perplexity": math.exp(training["best_validation_loss"]),
        "test_perplexity": math.exp(training["test_loss"]),
        **{f"hit_rate_{policy}": simulation["hit_rate"].get(policy) for policy in ("lru", "next_use", "min")},
        "hit_rate_lru_per_layer": None if per_layer.empty else per_layer.item(),
        "failed_checks": sum("failed" in check["outcome"] for check in checks(results)),
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


def _settings(results: Results) -> list[dict[str, Any]]:
    """Settings and sizes beside the published ones; `differs` says whether a setting is another."""
    (run, training, *_), corpus, _, reference = results
    config, settings, theirs = run["config"], run["identity"]["dwr"], reference["configuration"]
    ours = {**config, **settings["training"], "balance_coefficient": settings["balance_coefficient"]}
    ours |= {"corpus": _corpus_name(corpus), "tokenizer": _tokenizer_name(corpus), "precision": training["precision"]}
    rows = [
        {"parameter": label, "ours": own, "theirs": other, "differs": own.casefold() != other.casefold()}
        for key, label in SETTINGS.items()
        for own, other in [(_plain(ours[key]), _plain(theirs[key]))]
    ]
    splits, embedding = corpus.tokens["splits"], config["vocab_size"] * config["d_model"]

    def about(key: str) -> str:
        return f"about {theirs[key]:,}"

    others = [
        ("Parameters", training["parameters"], theirs["parameters"]),
        ("Active parameters per token", training["active_parameters"], None),
        ("– without the token embedding", training["active_parameters"] - embedding, about("active_parameters")),
        ("Tokens in the training split", splits["train"]["num_tokens"], about("training_tokens")),
        ("Test tokens that also stand there", shared_text(splits["test"]), None),
        ("Optimizer steps", f"{training['steps']:,} of {training['steps_planned']:,}", theirs["steps"]),
        ("Device", run["identity"]["device"], theirs["hardware"]),
        ("Seed", run["identity"]["seed"], None),
    ]
    return rows + [{"parameter": label, "ours": own, "theirs": other, "differs": False} for label, own, other in others]


def _plain(value: Any) -> str:
    """A setting as text, the same for ours and the published one."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else fmt(value)


def _corpus_name(corpus: Corpus) -> str:
    """A name that means something without params.yaml; a hub's dataset as its configuration is called."""
    place = corpus.place
    if "packages" in place:
        return f"text of {count(len(place['packages']), 'installed package')}"
    if "path" in place:
        return place["name"] or place["path"]
    return f"{corpus.name} ({count(len(place['files']), 'file')})"


def _tokenizer_name(corpus: Corpus) -> str:
    tokenizer = corpus.tokens["tokenizer"]
    names = {"bpe": "byte-level BPE, trained on the corpus", "gpt2": "GPT-2 BPE (tiktoken)"}
    return names.get(tokenizer["kind"]) or tokenizer["path"]


def _sources(corpus: Corpus) -> list[dict[str, Any]]:
    """Tokens by source and split."""
    return [
        {"source": source}
        | {name: split["tokens_by_source"][source] for name, split in corpus.tokens["splits"].items()}
        for source in corpus.tokens["sources"]
    ]


def _balance(curve: "pd.DataFrame", layers: Iterable[int], top_k: int) -> list[dict[str, Any]]:
    """The balance loss of each layer: of the best checkpoint, and its range in training."""
    best = curve.loc[curve["validation_loss"].idxmin()]
    return [
        {
            "layer": layer,
            "validation": best[f"validation_balance_layer{layer}"],
            "as_trained": best[f"validation_balance_layer{layer}"] * top_k,
            "lowest": curve[f"train_balance_loss_layer{layer}"].min(),
            "highest": curve[f"train_balance_loss_layer{layer}"].max(),
        }
        for layer in layers
    ]
