"""What was run: the base, the text, and the variants."""

from dynaroute.reporting.dagformer.results import Results, Variant
from dynaroute.reporting.dagformer.wording import budget
from dynaroute.reporting.inputs import Record
from dynaroute.reporting.tables import NONE, count, published, shared_text, table


def setup(results: Results) -> str:
    """Base and data, and what differs from the published setting."""
    base, run, shared = results.base, results.main.run, results.setup
    tokens = results.tokens["splits"]
    train_windows = "all" if shared["train_windows"] is None else f"{shared['train_windows']:,}"
    rows = [
        ["Base", base_name(shared["base"])],
        ["Heads", f"{base['num_layers']} layers x {base['num_heads']} = {results.main.nodes} nodes"],
        ["Width, vocabulary", f"{base['hidden_size']:,}, {base['vocab_size']:,}"],
        ["Parameters of the base, frozen", f"{base['parameters']:,}"],
        ["Parameters of P1's predictor", f"{results.main.training['predictor_parameters']:,}"],
        ["Encoder of the text, frozen", _encoder_name(shared["encoder"])],
        ["Corpus", f"`{shared['corpus']}`: {tokens['train']['num_tokens']:,} tokens for training"],
        ["Test tokens that also stand in the training split", shared_text(tokens["test"])],
        ["Sources", ", ".join(results.tokens["sources"])],
        ["Window", f"{shared['seq_len']:,} tokens"],
        ["Training windows", train_windows],
        ["Validation windows (per-step tables)", f"{shared['validation_windows']:,} of the validation split"],
        ["Held-out windows (all other NLL)", f"{results.num_windows:,} of the test split"],
        ["Prefix protocol", f"the encoder reads {shared['prefix_tokens']:,} tokens; NLL counts the rest"],
        ["Device", run["identity"]["device"]],
    ]
    return "\n\n".join(
        [
            table(["item", "this run"], rows),
            published(f"{results.reference['setting']} (*{results.reference['document']}*)."),
            "Base, text, sizes and budgets differ from the published ones, so published NLL is there to show what was "
            "reported, not as a target: only differences to the baseline of the same run mean something.",
        ]
    )


def base_name(base: Record) -> str:
    """What the base is."""
    if base["kind"] == "pretrain":
        return "a small OLMo-2, pretrained here on the training split, all gates open"
    return f"{base['path']}" + (f", revision {base['revision']}" if base["revision"] else "")


def _encoder_name(encoder: Record) -> str:
    if encoder["kind"] == "base":
        return "the base's own last hidden states, averaged over tokens"
    return f"{encoder['path']}, averaged over tokens"


def variants(results: Results) -> str:
    """All variants: what each changes, its budget, and how its training went."""
    rows = [
        [
            variant.name,
            variant.run["from"],
            changes(variant, results.main) or NONE,
            budget(results, variant),
            health(variant),
        ]
        for variant in results.variants.values()
    ]
    alarms: dict[str, list[str]] = {}
    for variant in results.variants.values():
        if variant.training["verdict"] != "healthy":
            words = f"{variant.training['verdict']}, since {variant.training['verdict_reason']}"
            alarms.setdefault(words, []).append(variant.name)
    raised = [f"- {', '.join(members)}: {words}." for words, members in alarms.items()]
    return "\n\n".join(
        [
            table(["ID", "starts from", "differs from P1 in", "tokens", "training"], rows),
            "Training is watched for two failures. Collapsed: next to no hard gate is left. Saturated: the slope dA/dZ "
            "of the gates is next to nothing, so that no gradient reaches the predictor, whatever the loss.",
            "\n".join(raised) or "Neither alarm was raised.",
        ]
    )


def changes(variant: Variant, other: Variant) -> str:
    """The knobs in which a variant differs from another one, with its values."""
    return ", ".join(f"{key} {_value(variant.knobs[key])}" for key in variant.differs_from(other))


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def health(variant: Variant) -> str:
    """The verdict on a training."""
    verdict = variant.training["verdict"]
    return verdict if verdict == "healthy" else f"**{verdict}**"


def health_sentence(results: Results) -> str:
    """Which trainings raised an alarm."""
    ill: dict[str, list[str]] = {}
    for variant in results.variants.values():
        if variant.training["verdict"] != "healthy":
            ill.setdefault(variant.training["verdict"], []).append(variant.name)
    if not ill:
        return f"No alarm in training: none of {count(len(results.variants), 'variant')} saturated or collapsed."
    return "Alarms in training: " + "; ".join(f"{verdict}: {', '.join(found)}" for verdict, found in ill.items()) + "."
