"""reports/dwr_runs.md: what the balance loss costs and gives a cache, and which remedies for overfitting help.

Every number is read from a file that a stage wrote, and every verdict follows from a rule that stands beside it.
"""

import math
from pathlib import Path
from typing import Any

from dynaroute.config import Settings
from dynaroute.errors import DynarouteError
from dynaroute.reporting.figures import BLUE, VERMILION, saved_figure
from dynaroute.reporting.inputs import Record, read_record
from dynaroute.reporting.tables import count, figure, perplexity, table

REPORTS = Path("reports/dwr_runs")
RATES = ("hit_rate", "uniform_hit_rate")


def read_runs(settings: Settings) -> list[Record]:
    """Reads what every run found, the reference first.

    Raises:
        DynarouteError: a file is missing, damaged or of other settings.
    """
    runs = []
    for name in sorted(settings.dwr_runs, key=lambda name: name != "reference"):
        run = read_record(REPORTS / f"{name}.json")
        if run["settings"] != settings.dwr_run(name).model_dump():
            raise DynarouteError(f"{run.path}: of other settings than dwr_runs.{name}: run dvc repro")
        runs.append(run)
    return runs


def sweep(runs: list[Record]) -> list[Record]:
    """The reference and the runs that differ from it in the balance coefficient alone, by that coefficient."""
    key = "balance_coefficient"
    chosen = [run for run in runs if set(_changes(run, runs[0])) <= {key}]
    return sorted(chosen, key=lambda run: run["settings"][key])


def page(runs: list[Record]) -> str:
    """The page as Markdown."""
    reference, swept = runs[0], sweep(runs)
    others = [reference, *(run for run in runs if run not in swept)]
    size, text = count(reference["parameters"], "parameter"), count(reference["training_tokens"], "token")
    parts = [
        "# DWR runs",
        f"DWR models trained for this comparison. `reference` has {size} and reads {text} of "
        f"`{reference['settings']['corpus']}` {reference['epochs']:.3g} times; every other run is `reference` with the "
        "changes that stand beside it. The model of the [DWR report](dwr.md) is not among them: with a budget of "
        "their own, they compare with each other alone. Each run has one seed, so how much another seed would change "
        "is not known: differences show a direction at most where they are large, and small ones are no finding. Made "
        "by `dvc repro report_dwr_runs`.",
        *("## 1. The balance loss and the cache", _balance(swept)),
        *("## 2. Remedies for overfitting", _remedies(others)),
    ]
    return "\n\n".join(parts) + "\n"


def plot_runs(swept: list[Record], path: str | Path) -> None:
    """Test perplexity against hit rate at a third of the experts, by policy, a point for each balance coefficient."""
    losses = [math.exp(run["test_loss"]) for run in swept]
    with saved_figure(path, 5.4, 3.4) as figure:
        axes = figure.subplots()
        styles = (("lru", "LRU", BLUE, "o-", -1), ("next_use", "next use", VERMILION, "s--", 1))
        for policy, label, color, marker, side in styles:
            rates = [run["hit_rate"][policy] for run in swept]
            axes.plot(rates, losses, marker, color=color, linewidth=0.8, label=label)
            uniform = swept[0]["uniform_hit_rate"][policy]
            axes.axvline(uniform, color=color, linestyle=":", label=f"{label}, uniform routing")
            # Upright, below one line and above the other: runs that lie close together keep their labels apart.
            beside = {"xytext": (0, 6 * side), "textcoords": "offset points", "rotation": 90, "ha": "center"}
            beside["va"] = "bottom" if side > 0 else "top"
            for rate, loss, run in zip(rates, losses, swept, strict=True):
                text = f"λ = {run['settings']['balance_coefficient']:g}"
                axes.annotate(text, (rate, loss), **beside, fontsize=7, color=color)
        axes.margins(x=0.12)
        axes.set_ylim(0.95 * min(losses), 1.08 * max(losses))  # what differs by less than a few percent looks alike
        axes.set_xlabel(f"hit rate at {swept[0]['capacity']} of {swept[0]['experts']} experts")
        axes.set_ylabel("perplexity of the test text")
        axes.legend()


def _balance(swept: list[Record]) -> str:
    reference = next(run for run in swept if run["name"] == "reference")
    best = max(swept, key=lambda run: run["hit_rate"]["lru"])
    rows = [
        [
            *(f"`{run['name']}`", f"{run['settings']['balance_coefficient']:g}", perplexity(run["test_loss"])),
            f"{run['smallest_load']:.2f}–{run['largest_load']:.2f}",
            *(f"{run[rate][policy]:.3f}" for policy in ("lru", "next_use", "min") for rate in RATES),
        ]
        for run in swept
    ]
    if best is reference:
        found = "No coefficient gives LRU more hits than that of the reference: "
        found += f"{best['hit_rate']['lru']:.3f}, of uniform routing {best['uniform_hit_rate']['lru']:.3f}."
    else:
        found = (
            f"LRU hits most with λ = {best['settings']['balance_coefficient']:g}: {best['hit_rate']['lru']:.3f}, "
            f"against {reference['hit_rate']['lru']:.3f} of the reference, where it hits "
            f"{best['uniform_hit_rate']['lru']:.3f} of uniform routing; at a test perplexity of "
            f"{perplexity(best['test_loss'])} against {perplexity(reference['test_loss'])}."
        )
    header = ["run", "λ", "test perplexity", "load"]
    header += [*("`lru`", "uniform"), *("`next_use`", "uniform"), *("`min`", "uniform")]
    return "\n\n".join(
        [
            f"λ weighs the loss that makes routers use all experts alike, which is what a cache likes least. Hit rates "
            f"are those of {count(reference['trace_tokens'], 'token')} of the test text, read one by one, at "
            f"{reference['capacity']} of {reference['experts']} experts. Load: of the least and of the most used "
            "expert of a layer, in units of the uniform share, on the validation text. Uniform: what the policy "
            "beside it hits of as many tokens that are routed uniformly and independently; what it hits above that is "
            f"due to the model's routing. No online policy can expect more of those than the share of experts held, "
            f"{reference['capacity'] / reference['experts']:.3f}.",
            figure("figures/dwr_runs.png", "Test perplexity and hit rate by balance coefficient λ."),
            table(header, rows),
            found,
        ]
    )


def _remedies(runs: list[Record]) -> str:
    reference = runs[0]
    rows = [
        [
            f"`{run['name']}`",
            ", ".join(f"{key} = {value}" for key, value in _changes(run, reference).items()) or "none",
            f"{run['parameters']:,}",
            f"{run['final_train_loss']:.3f}",
            f"{run['final_validation_loss']:.3f}",
            f"{_gap(run):+.3f}",
            f"{run['validation_loss']:.3f} ({run['best_epoch']:.3g})",
            perplexity(run["test_loss"]),
            *(f"{run[rate]['lru']:.3f}" for rate in RATES),
        ]
        for run in runs
    ]
    header = ["run", "changes", "parameters", "training loss, at the end", "validation loss, at the end", "gap"]
    header += ["best validation loss (epoch)", "test perplexity", "hit rate, `lru`", "uniform"]
    better = [f"`{run['name']}`" for run in runs[1:] if run["test_loss"] < reference["test_loss"]]
    narrower = [f"`{run['name']}`" for run in runs[1:] if _gap(run) < _gap(reference)]
    return "\n\n".join(
        [
            "Losses in nats per token, of the training text without dropout, too. The gap is validation less training; "
            "test perplexity and hit rate are of the weights with the best validation loss, the hit rate at a third of "
            "the run's own experts, beside that of uniform routing. "
            "Perplexities of different tokenizers do not compare.",
            table(header, rows),
            f"With this one seed, a lower test perplexity than the reference: {', '.join(better) or 'none'}; "
            f"a smaller gap at the end: {', '.join(narrower) or 'none'}. Which of these would hold with another "
            "seed was not measured.",
        ]
    )


def _gap(run: Record) -> float:
    return run["final_validation_loss"] - run["final_train_loss"]


def _changes(run: Record, reference: Record) -> dict[str, Any]:
    """The settings that differ from the reference's, by their names in params.yaml."""
    own, theirs = (
        {**record["settings"], **{f"training.{key}": value for key, value in record["settings"]["training"].items()}}
        for record in (run, reference)
    )
    return {key: value for key, value in own.items() if key != "training" and value != theirs[key]}
