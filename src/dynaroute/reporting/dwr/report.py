"""reports/dwr.md: the published report's structure, filled from the outputs of one run.

Nothing here depends on time, machine or measured speed, so the page has the same bytes on every run; what does is on
the page of `measured.py`. Numbers of the reference appear in columns headed "published" and in quotations that begin
with "Published", and nowhere else.
"""

from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.cached_inference import cached_inference, hit_rate_sentence
from dynaroute.reporting.dwr.configuration import configuration, corpus
from dynaroute.reporting.dwr.files import checks, export, inventory, properties
from dynaroute.reporting.dwr.results import CHECKPOINTS, Results
from dynaroute.reporting.dwr.routers import collapse_sentence, routers, spread_sentence
from dynaroute.reporting.dwr.training import (
    against_entropy,
    learning,
    overfitting,
    overfitting_sentence,
    training_curve,
)
from dynaroute.reporting.inputs import file_size
from dynaroute.reporting.tables import count, perplexity


def page(results: Results) -> str:
    """The report as Markdown."""
    parts = [
        "# Dynamic weight retrieval (DWR): results",
        introduction(results),
        *("## At a glance", at_a_glance(results)),
        *("## 1. Training configuration", configuration(results)),
        *("## 2. Training curve", training_curve(results)),
        "## 3. Key findings",
        *("### 3.1 Does it train?", learning(results)),
        *("### 3.2 Does it overfit?", overfitting(results)),
        *("### 3.3 What do the routers do?", routers(results)),
        *("### 3.4 Expert export", export(results)),
        *("## 4. Checkpoint inventory", inventory(results)),
        *("## 5. Validated properties", properties(results)),
        *("## 6. Cached inference", cached_inference(results)),
        *("## 7. Corpus", corpus(results)),
        *("## 8. Known limitations", limitations(results)),
    ]
    return "\n\n".join(parts) + "\n"


def introduction(results: Results) -> str:
    """What the page is, and how to make it again."""
    return (
        f"Run `{results.run['run']}`: a Mixture-of-Experts language model, trained, exported to one file for each "
        "expert, and run with its experts fetched through a cache. Every number below is from that run, but for those "
        f"marked as published, which are from *{results.reference['document']}* "
        f"({results.reference['setting']}) and stand beside ours for comparison.\n\n"
        "How to reproduce: `make repro`, or `dvc repro report_dwr`. On the same kind of CPU, the same settings and "
        "packages give the same bytes. Times, memory and speeds are on [a page of their own](dwr_measured.md)."
    )


def at_a_glance(results: Results) -> str:
    """The findings, one line each."""
    summary, config = results.training.summary, results.run["config"]
    course = findings.course(results.training.curve)
    outcomes = [passed for _, _, passed in checks(results)]
    lines = [
        f"Best validation loss {course.best.validation_loss:.4f} nats per token (perplexity "
        f"{perplexity(course.best.validation_loss)}) at step {course.best.step:,.0f}, "
        f"{against_entropy(course.best.validation_loss, summary['validation_unigram_entropy'])}. "
        f"Test perplexity of that checkpoint: {perplexity(summary['test_loss'])}.",
        overfitting_sentence(course),
        spread_sentence(results.training.router),
        collapse_sentence(results.training.router),
        hit_rate_sentence(results),
        f"{outcomes.count(True)} of {count(len(outcomes), 'check')} that the pipeline made passed.",
    ]
    sizes = f"{summary['parameters']:,} parameters, {config['num_layers'] * config['num_experts']} experts"
    return "\n".join(f"- {line}" for line in (f"{sizes}, {course.last.tokens:,.0f} tokens trained on.", *lines))


def limitations(results: Results) -> str:
    """What to keep in mind; the published report's own points first, each with what this run did about it."""
    summary, curve = results.training.summary, results.training.curve
    dwr = results.run["identity"]["dwr"]
    course, load = findings.course(curve), findings.relative_load(results.training.router)
    ratio = summary["parameters"] / summary["training_tokens"]
    factor, patience = dwr["capacity_factor"], dwr["training"]["early_stopping_patience"]
    best, last = (file_size(CHECKPOINTS / f"{name}.safetensors") for name in ("best", "last"))
    if factor is None:
        capacity = (
            "none: no token loses an expert, and nothing bounds what one expert gets; the most loaded got "
            f"{load.max():.2f} of the uniform load on the validation split."
        )
    else:
        dropped = curve["train_dropped_share"].iloc[-1]
        capacity = (
            f"a factor of {factor:g}; {dropped:.2%} of assignments were dropped in the last interval of training."
        )
    if patience is None:
        stopping = "off: all steps are taken, whatever validation says; the best checkpoint is kept."
    else:
        outcome = "it ended this run" if summary["stopped_early"] else "this run did not need it"
        stopping = f"after {count(patience, 'validation')} without improvement; {outcome}."
    points = [
        f"**Scale.** {ratio:.2f} parameters for each training token. "
        + ("Validation loss turned." if course.turned else "Validation loss did not turn within this run's steps."),
        f"**Expert capacity**: {capacity}",
        "**Dispatch.** Tokens are sorted by expert and an expert without tokens costs nothing, but the others are "
        "still computed one after another.",
        f"**Early stopping**: {stopping}",
        f"**Checkpoint size.** `last` is {last / best:.1f} times as large as `best`, for the optimizer's moments; "
        "there is one of each, however many epochs are run.",
        "**One run, one seed.** No finding here has an error bar over runs.",
        "**Windows.** Losses are over windows that do not overlap, so the first tokens of each have little context.",
        "**Cached inference** is measured at batch 1.",
    ]
    if "packages" in results.corpus.place:
        points.append("**Corpus.** It is what the installed packages say: another version of one is another text.")
    return "\n".join(f"{number}. {point}" for number, point in enumerate(points, 1))
