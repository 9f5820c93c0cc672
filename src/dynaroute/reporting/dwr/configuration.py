"""What was trained, and on what: settings beside the published ones, and the corpus."""

from collections.abc import Callable
from typing import Any

from dynaroute.reporting.dwr.results import Corpus, Results
from dynaroute.reporting.tables import NONE, count, shared_text, size, table


def configuration(results: Results) -> str:
    """Settings and sizes beside the published ones, and which settings differ."""
    theirs = results.reference["configuration"]
    config, dwr = results.run["config"], results.run["identity"]["dwr"]
    ours = {**config, **dwr["training"], "balance_coefficient": dwr["balance_coefficient"]}
    ours["corpus"], ours["tokenizer"] = _corpus_name(results.corpus), _tokenizer_name(results.corpus)
    ours["precision"] = _precision(results)
    rows = [(label, show(ours), show(theirs)) for label, show in _SETTINGS]
    differing = [label for label, own, other in rows if own.casefold() != other.casefold()]
    summary = results.training.summary
    unembedded = summary["active_parameters"] - config["vocab_size"] * config["d_model"]
    train = results.corpus.tokens["splits"]["train"]
    rows += [
        ("Parameters", f"{summary['parameters']:,}", f"{theirs['parameters']:,}"),
        ("Active parameters per token", f"{summary['active_parameters']:,}", NONE),
        ("– without the token embedding", f"{unembedded:,}", f"about {theirs['active_parameters']:,}"),
        ("Tokens in the training split", f"{train['num_tokens']:,}", f"about {theirs['training_tokens']:,}"),
        ("Test tokens that also stand there", shared_text(results.corpus.tokens["splits"]["test"]), NONE),
        ("Optimizer steps", f"{summary['steps']:,} of {summary['steps_planned']:,}", f"{theirs['steps']:,}"),
        ("Device", results.run["identity"]["device"], theirs["hardware"]),
        ("Seed", str(results.run["identity"]["seed"]), NONE),
    ]
    difference = (
        f"Settings that differ from the published run: {', '.join(differing).lower()}."
        if differing
        else "No setting differs from the published run."
    )
    source = f"published ({theirs['source']})"
    return f"{table(['parameter', 'this run', source], rows)}\n\n{difference}"


def _setting(key: str) -> Callable[[dict[str, Any]], str]:
    def show(settings: dict[str, Any]) -> str:
        value = settings[key]
        return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    return show


_SETTINGS = [
    ("Corpus", _setting("corpus")),
    ("Tokenizer", _setting("tokenizer")),
    ("Padded vocabulary", _setting("vocab_size")),
    ("d_model", _setting("d_model")),
    ("d_ff of an expert", _setting("d_ff")),
    ("Layers", _setting("num_layers")),
    ("Heads", _setting("num_heads")),
    ("Experts per layer", _setting("num_experts")),
    ("top_k", _setting("top_k")),
    ("Capacity factor", _setting("capacity_factor")),
    ("Sequence length", _setting("max_seq_len")),
    ("Dropout", lambda settings: f"{settings['dropout']:g}"),
    ("Balance coefficient", lambda settings: f"{settings['balance_coefficient']:g}"),
    ("Optimizer", lambda settings: "AdamW, betas {:g} and {:g}".format(*settings["betas"])),
    ("Learning rate", lambda settings: f"{settings['lr']:g}, cosine decay to {settings['min_lr']:g}"),
    ("Warm-up steps", _setting("warmup_steps")),
    ("Weight decay", lambda settings: f"{settings['weight_decay']:g}"),
    ("Gradient clipping (norm)", lambda settings: f"{settings['clip_norm']:g}"),
    ("Batch (sequences)", _setting("batch_size")),
    ("Epochs", lambda settings: f"{settings['epochs']:g}"),
    ("Precision", _setting("precision")),
    ("Validation every", lambda settings: _steps(settings["validate_every"])),
    ("Early stopping after", lambda settings: _validations(settings["early_stopping_patience"])),
]


def _steps(every: int | str) -> str:
    return every if isinstance(every, str) else count(every, "step")


def _validations(patience: int | None) -> str:
    return "none" if patience is None else f"{count(patience, 'validation')} without improvement"


def _precision(results: Results) -> str:
    used, wanted = results.training.summary["precision"], results.run["identity"]["dwr"]["training"]["precision"]
    return used if used == wanted else f"{used} ({wanted} is set, but would be slow on that device)"


def _corpus_name(corpus: Corpus) -> str:
    """A name that means something without params.yaml; a hub's dataset as its configuration is called."""
    place = corpus.place
    if "packages" in place:
        return f"documentation of {count(len(place['packages']), 'installed package')}"
    if "path" in place:
        return place["name"] or place["path"]
    return f"{corpus.name} ({count(len(place['files']), 'file')})"


def _tokenizer_name(corpus: Corpus) -> str:
    tokenizer = corpus.tokens["tokenizer"]
    match tokenizer["kind"]:
        case "bpe":
            return "byte-level BPE, trained on the corpus"
        case "gpt2":
            return "GPT-2 BPE (tiktoken)"
    return tokenizer["path"]


def corpus(results: Results) -> str:
    """What the text is, and tokens by split and source."""
    tokens, place = results.corpus.tokens, results.corpus.place
    splits = tokens["splits"]
    totals = [
        [
            name,
            f"{split['num_documents']:,}",
            f"{split['num_characters']:,}",
            f"{split['num_tokens']:,}",
            f"{split['unigram_entropy']:.4f}",
        ]
        for name, split in splits.items()
    ]
    versions = place.get("packages", {})
    by_source = [
        [source, *([versions.get(source, NONE)] if versions else []), *(f"{n[source]:,}" for n in counts)]
        for counts in [[split["tokens_by_source"] for split in splits.values()]]
        for source in tokens["sources"]
    ]
    header = ["source", *(["version"] if versions else []), *(f"{name} tokens" for name in splits)]
    return "\n\n".join(
        [
            f"`{results.corpus.name}`: {_corpus_place(place)} Tokenizer: {_tokenizer_name(results.corpus)}, "
            f"{tokens['vocab_size']:,} tokens. Splits are by document.",
            table(["split", "documents", "characters", "tokens", "unigram entropy (nats)"], totals),
            table(header, by_source),
        ]
    )


def _corpus_place(place: dict[str, Any]) -> str:
    if "packages" in place:
        return "English documentation of installed Python packages, read by static parsing; no network."
    if "path" in place:
        parts = [place["path"], place["name"], f"revision {place['revision']}" if place["revision"] else None]
        return f"the dataset {', '.join(part for part in parts if part)}."
    num_bytes = sum(state["bytes"] for state in place["files"].values())
    return f"{count(len(place['files']), 'local file')}, {size(num_bytes)} as stored."
