"""How training went: the curve, what was learned, whether it overfits."""

from typing import TYPE_CHECKING

from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.findings import LEVEL, Course
from dynaroute.reporting.dwr.results import Results
from dynaroute.reporting.tables import NONE, figure, perplexity, published, table

if TYPE_CHECKING:
    import pandas as pd

SPIKE = 0.5  # nats: a loss that rises by more from one validation to the next counts as a spike
MAX_CURVE_ROWS = 24  # of the printed training curve; the file has all of them


def training_curve(results: Results) -> str:
    """Losses by step, and the published ones."""
    curve, reference = results.training.curve, results.reference["training_curve"]
    shown = _thinned(curve)
    header = ["step", "epoch", "tokens", "learning rate", "train loss", "train PPL", "val loss", "val PPL", "status"]
    rows = [
        [
            f"{row.step:,.0f}",
            f"{row.epoch:.2f}",
            f"{row.tokens:,.0f}",
            f"{row.lr:.2e}",
            *((f"{row.train_loss:.4f}", perplexity(row.train_loss)) if row.step else (NONE, NONE)),
            f"{row.validation_loss:.4f}",
            perplexity(row.validation_loss),
            _status(curve, index),
        ]
        for index, row in shown.iterrows()
    ]
    their_rows = [
        [
            str(row["epoch"]),
            f"{row['train_loss']:.4f}",
            f"{row['train_perplexity']:.1f}",
            f"{row['validation_loss']:.4f}",
            f"{row['validation_perplexity']:.1f}",
            "**best**" if row["epoch"] == reference["best_epoch"] else "",
        ]
        for row in reference["rows"]
    ]
    their_table = table(["epoch", "train loss", "train PPL", "val loss", "val PPL", "status"], their_rows)
    omitted = len(curve) - len(shown)
    note = (
        f" {omitted} of {len(curve)} validations are left out here; `reports/dwr/training.csv` has all."
        if omitted
        else ""
    )
    return "\n\n".join(
        [
            figure("figures/dwr_training_curves.png", "Training and validation loss by optimizer step."),
            table(header, rows),
            "Losses are in nats per token, PPL is their exponential. A training loss is the mean over all steps since "
            "the previous row, with dropout; a validation loss is over the whole validation split, without it. Status: "
            f"how far the validation loss is above the lowest so far.{note}",
            published(f"Losses by epoch ({reference['source']}; {results.reference['setting']}).\n\n{their_table}"),
            "Losses of different tokenizers are not comparable: a token of a smaller vocabulary holds less text.",
        ]
    )


def _thinned(curve: "pd.DataFrame") -> "pd.DataFrame":
    """At most `MAX_CURVE_ROWS` rows, evenly spaced, the best and the last among them."""
    step = -(-len(curve) // (MAX_CURVE_ROWS - 2))
    kept = {*range(0, len(curve), step), int(curve["validation_loss"].argmin()), len(curve) - 1}
    return curve.iloc[sorted(kept)]


def _status(curve: "pd.DataFrame", index: int) -> str:
    losses = curve["validation_loss"]
    if index == losses.idxmin():
        return "**best**"
    above = losses[index] - losses[:index].min()
    return "start" if index == 0 else "new low" if above < 0 else f"+{above:.4f}"


def learning(results: Results) -> str:
    """Whether training loss falls, and what the model has learned."""
    summary, curve = results.training.summary, results.training.curve
    trained = curve[curve["step"] > 0]
    losses = trained["train_loss"]
    first, last = losses.iloc[0], losses.iloc[-1]
    rises = int((losses.diff() > 0).sum())
    best = findings.course(curve).best
    parts = []
    if len(losses) > 1:
        course = "fell" if last < first else "did not fall"
        compared = len(losses) - 1
        if compared == 1:
            steadily = "two values, and so one comparison"
        elif not rises:
            steadily = f"it fell in each of {compared} comparisons"
        else:
            steadily = f"it rose in {rises} of {compared} comparisons"
        parts.append(
            f"Training loss {course}: {first:.4f} as the mean of steps 1 to {trained['step'].iloc[0]:,}, {last:.4f} as "
            f"that of the last {trained['step'].iloc[-1] - trained['step'].iloc[-2]:,} steps"
            + (f" ({steadily})." if last < first else ".")
        )
    else:
        parts.append(f"Training loss: {first:.4f}, the mean over all steps up to the only validation.")
    parts.append(
        f"The best validation loss, {best.validation_loss:.4f}, is "
        f"{against_entropy(best.validation_loss, summary['validation_unigram_entropy'])}, which is what knowing the "
        "frequencies of all tokens, and no context, would give."
    )
    parts.append(
        f"On the test split, the best checkpoint has a loss of {summary['test_loss']:.4f} (perplexity "
        f"{perplexity(summary['test_loss'])})."
    )
    return f"{' '.join(parts)}\n\n{stability(results)}"


def stability(results: Results) -> str:
    """Whether gradients stayed finite and losses without a jump, as far as what was recorded can tell."""
    curve, reference = results.training.curve, results.reference["stability"]
    norms = curve.loc[curve["step"] > 0, "train_gradient_norm"]
    jumps = [
        f"{words} rose by up to {rise:.4f} nats from one row to the next"
        for words, name in (("training loss", "train_loss"), ("validation loss", "validation_loss"))
        if (rise := float(curve[name].diff().max())) > SPIKE
    ]
    spikes = "; ".join(jumps) or f"no loss rose by more than {SPIKE:g} nats from one row to the next"
    clip = results.run["identity"]["dwr"]["training"]["clip_norm"]
    return (
        "Stability: no step had a loss or a gradient norm that was not finite, at which training stops with an error; "
        f"{spikes}. The gradient norm before clipping at {clip:g} was between {norms.min():.3f} and {norms.max():.3f}. "
        "Rows hold means over the steps since the previous one, so a spike of a single step may be hidden.\n\n"
        + published(f"{reference['words']} ({reference['source']}).")
    )


def against_entropy(loss: float, entropy: float) -> str:
    """Where a validation loss stands against the unigram entropy of its text."""
    side = "below" if loss < entropy else "above (not below)"
    return f"{abs(entropy - loss):.4f} nats {side} the unigram entropy of the validation text ({entropy:.4f})"


def overfitting(results: Results) -> str:
    """Whether validation loss turned, and how far it is from training loss."""
    course, summary = findings.course(results.training.curve), results.training.summary
    rows = [
        [label, f"{row.step:,.0f}", f"{row.train_loss:.4f}", f"{row.validation_loss:.4f}", f"{gap:+.4f}"]
        for label, row in (("best validation", course.best), ("last validation", course.last))
        for gap in [row.validation_loss - row.train_loss]
        if row.step
    ]
    split = summary["training_tokens"]
    ending = "Early stopping ended the run" if summary["stopped_early"] else "The run took all of its steps"
    theirs = results.reference["training_curve"]["rows"]
    gaps = [row["validation_loss"] - row["train_loss"] for row in (theirs[0], theirs[-1])]
    rise = theirs[-1]["validation_loss"] - min(row["validation_loss"] for row in theirs)
    config = results.reference["configuration"]
    return "\n\n".join(
        [
            f"{overfitting_sentence(course)} {ending} ({summary['steps']:,} of {summary['steps_planned']:,}). "
            f"Rule: validation loss has turned if it ends more than {LEVEL:g} nats above its best, and the model "
            "overfits if training loss fell meanwhile.",
            table(["at", "step", "train loss", "val loss", "gap (val - train)"], rows),
            f"The model has {summary['parameters'] / split:.2f} parameters for each token of the training split, and "
            f"was trained on {course.last.tokens / split:.2f} times that split.",
            published(
                f"Validation loss turned after epoch {results.reference['training_curve']['best_epoch']} and ended "
                f"{rise:.4f} above its best; the gap widened from {gaps[0]:.2f} (epoch {theirs[0]['epoch']}) to "
                f"{gaps[1]:.2f} (epoch {theirs[-1]['epoch']}), with about "
                f"{config['parameters'] / config['training_tokens']:.0f} parameters for each training token "
                f"({results.reference['training_curve']['source']})."
            ),
        ]
    )


def overfitting_sentence(course: Course) -> str:
    """What became of validation loss after its best."""
    if course.overfitted:
        return (
            f"It overfits: after step {course.best.step:,.0f} validation loss rose by {course.rise:.4f} nats while "
            "training loss went on falling."
        )
    if course.turned:
        return (
            f"Validation loss turned after step {course.best.step:,.0f} and rose by {course.rise:.4f} nats, but "
            "training loss did not fall meanwhile: that is instability, not overfitting."
        )
    if course.rise > 0:
        return (
            f"No overfitting in this run: validation loss ended {course.rise:.4f} nats above its best of step "
            f"{course.best.step:,.0f}, which counts as level."
        )
    return "No overfitting in this run: the last validation loss is the lowest."
