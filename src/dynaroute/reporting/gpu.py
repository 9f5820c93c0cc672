"""reports/gpu.md: the published sizes on one GPU. What was not measured is said to be so, section by section.

Every number is read from a file that a stage wrote, and every verdict follows from a rule that stands beside it.
"""

from pathlib import Path
from typing import NamedTuple

from dynaroute.reporting.dwr import findings
from dynaroute.reporting.dwr.results import DATA, Training, read_training
from dynaroute.reporting.inputs import Record, check_same_run, read_record
from dynaroute.reporting.tables import NONE, count, duration, perplexity, size, table

BENCHMARKS = Path("reports/benchmarks")
NOT_MEASURED = "not measured"
PATIENCE = 3  # validations without improvement after which an early stop is said to have come
STEP_CARD = "NVIDIA A40"  # on which the published training step was taken


class Results(NamedTuple):
    """What was measured so far; None: it was not."""

    training: Training | None
    training_timing: Record | None
    export: Record | None
    speed: Record | None  # benchmark_moe
    cache: Record | None  # benchmark_gpu_cache
    dag: Record | None  # benchmark_dag
    step: Record | None  # benchmark_dagformer_step
    cards: Record
    published_timing: Record  # of the DAGFormer training


class Goal(NamedTuple):
    """A goal, and what was found."""

    text: str
    least: bool  # whether the value must be at least the bound, or at most
    bound: float
    value: float | None  # None: not measured
    where: str  # of the value


def read_results() -> Results:
    """Reads what there is, in gpu/.

    Raises:
        DynarouteError: a file is damaged or of another run, or the published figures are missing.
    """
    training = read_training() if (DATA / "train/summary.json").exists() else None
    timing, export = (_read(DATA / name) for name in ("measured/training.json", "export/summary.json"))
    speed, cache, dag, step = (
        _read(BENCHMARKS / f"{name}.json") for name in ("moe", "gpu_cache", "dag", "dagformer_step")
    )
    if training:
        check_same_run(training.summary["run"], *(record for record in (export, cache) if record))
    published = read_record("../reports/reference.yaml")["dagformer"]["timing"]
    return Results(training, timing, export, speed, cache, dag, step, read_record("cards.yaml"), published)


def _read(path: Path) -> Record | None:
    return read_record(path) if path.exists() else None


def page(results: Results, device: str, other_corpora: list[str]) -> str:
    """The page as Markdown.

    Args:
        results: what there is.
        device: of the settings; with cpu, the page says that its figures are none of a GPU's.
        other_corpora: on which the training was validated as well.
    """
    parts = [
        "# On a GPU",
        "The published sizes on one GPU. `make gpu` runs what is missing, stage by stage (`gpu/dvc.yaml` with "
        "`gpu/params.yaml`), and writes this page; what has no results file is said to be not measured.",
        *(
            ["**These figures are a CPU's** (`device: cpu`), and no verdict holds for a GPU."]
            if device == "cpu"
            else []
        ),
        *("## Goals", _goals(results, device)),
        *("## Machine", _machines(results)),
        *("## 1. Training at the published size", _training(results, other_corpora)),
        *("## 2. Training speed against a dense model", _speed(results)),
        *("## 3. Cached inference", _cache(results.cache)),
        *("## 4. The DAG forward", _dag(results.dag)),
        *("## 5. The predictor's training step", _step(results)),
    ]
    return "\n\n".join(parts) + "\n"


def goals(results: Results) -> list[Goal]:
    """The goals with their values."""
    speed = cached = ratio = share = None
    where = {"speed": "", "cached": "", "ratio": "", "share": ""}
    if results.speed:
        models = results.speed["training"]["models"]
        ours, dense = (_fastest(models, name) for name in ("dynaroute", "dense"))
        if ours and dense:
            speed = models[ours]["tokens_per_second"] / models[dense]["tokens_per_second"]
            where["speed"] = f"{ours} to {dense}"
    if results.cache:
        best = max(_at_a_third(results.cache), key=lambda row: row["ratio_to_resident"])
        cached = best["ratio_to_resident"]
        where["cached"] = f"{best['experts_in']}, {best['policy']}, {best['prefetch']}"
    if results.dag:
        measured = [result for result in results.dag["results"] if result["candidates"]]
        worst = max(measured, key=_ratio_of_the_fastest)
        ratio, where["ratio"] = _ratio_of_the_fastest(worst), _shape(worst)
        worst = min(measured, key=lambda result: result["fraction_of_byte_bound"])
        share, where["share"] = worst["fraction_of_byte_bound"], _shape(worst)
    resident = results.cache and results.cache["resident_tokens_per_second"]
    return [
        Goal(
            "DWR training tokens/s, to the fastest dense of equal active parameters", True, 0.6, speed, where["speed"]
        ),
        Goal("Resident decoding at batch 1, tokens/s", True, 300, resident, "median"),
        Goal("Decoding with a third of the experts, to resident", True, 0.7, cached, where["cached"]),
        Goal("DAG forward and backward, to the fastest dense, at the worst size", False, 2.0, ratio, where["ratio"]),
        Goal("Share of the byte bound reached, at the worst size", True, 0.6, share, where["share"]),
    ]


def _goals(results: Results, device: str) -> str:
    rows = []
    for goal in goals(results):
        bound = f"at {'least' if goal.least else 'most'} {goal.bound:g}"
        if goal.value is None:
            rows.append([goal.text, bound, NONE, NONE, NOT_MEASURED])
            continue
        reached = goal.value >= goal.bound if goal.least else goal.value <= goal.bound
        value = f"{goal.value:,.0f}" if goal.bound > 10 else f"{goal.value:.3f}"
        verdict = "reached" if reached else "**not reached**"
        rows.append([goal.text, bound, value, goal.where, verdict if device == "cuda" else NONE])
    return (
        f"{table(['goal', 'bound', 'value', 'of', 'verdict'], rows)}\n\n"
        "Of a model and its compiled form the faster counts, for ours and for dense; of cached decoding at about a "
        "third of the experts the fastest cell; of the sizes of the DAG forward that ran the worst."
    )


def _fastest(models: Record, name: str) -> str | None:
    """Which of a model and its compiled form took the least time, if one ran."""
    ran = [key for key in (name, f"{name}_compiled") if key in models and "failed" not in models[key]]
    return max(ran, key=lambda key: models[key]["tokens_per_second"], default=None)


def _at_a_third(cache: Record) -> list[Record]:
    third = cache["capacity_nearest_a_third"]
    return [row for row in cache["rows"] if row["capacity"] == third]


def _ratio_of_the_fastest(result: Record) -> float:
    """Forward and backward: the fastest way of ours to the fastest of dense."""
    candidates = result["candidates"]
    ours, dense = (
        min(
            candidates[key]["forward_backward"]["milliseconds"]
            for key in (name, f"{name}_compiled")
            if key in candidates
        )
        for name in ("ours", "dense")
    )
    return ours / dense


def _machines(results: Results) -> str:
    """The machines of all measurements, one line each if they differ."""
    named = {
        "train_dwr": results.training_timing, "benchmark_moe": results.speed, "benchmark_gpu_cache": results.cache,
        "benchmark_dag": results.dag, "benchmark_dagformer_step": results.step,
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for name, record in named.items():
        if record:
            text = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
            found.setdefault(text, []).append(name)
    if not found:
        return "Nothing was measured yet."
    lines = [f"- {', '.join(f'`{name}`' for name in names)}: {text}." for text, names in found.items()]
    return "By stage, each of which `dvc repro gpu/dvc.yaml:STAGE` runs:\n\n" + "\n".join(lines)


def _training(results: Results, other_corpora: list[str]) -> str:
    if results.training is None:
        return _missing("train_dwr")
    _, summary, curve, router = results.training
    course = findings.course(curve)
    best = course.best
    header = [
        "epoch",
        "step",
        "train loss",
        "validation loss",
        "validation PPL",
        *(f"`{n}` loss" for n in other_corpora),
    ]
    rows = [
        [
            *(f"{row['epoch']:.2f}", f"{row['step']:,.0f}"),
            f"{row['train_loss']:.4f}" if row["step"] else NONE,
            f"{row['validation_loss']:.4f}" + (" **best**" if row["step"] == best.step else ""),
            perplexity(row["validation_loss"]),
            *(f"{row[f'validation_{name}_loss']:.4f}" for name in other_corpora),
        ]
        for _, row in curve.iterrows()
    ]
    norms = findings.gate_norms_by_layer(router)
    by_layer = [
        [str(layer), *(f"{value:.3f}" for value in norms.loc[layer]), f"{best[f'validation_balance_layer{layer}']:.4f}"]
        for layer in norms.index
    ]
    failed = [name.replace("_", " ") for name, passed in summary["checks"].items() if passed is not True]
    text = [
        f"{summary['parameters']:,} parameters, {summary['active_parameters']:,} active for a token; "
        f"{summary['training_tokens']:,} training tokens; {summary['precision']}; run `{summary['run']}`. "
        + (f"**Failed checks**: {', '.join(failed)}." if failed else "Every check of the training passed."),
        table(header, rows),
        "Losses are in nats per token: of the training split with dropout, of held-out documents of the same corpus, "
        "and of corpora that are not trained on.",
    ]
    if other_corpora:
        text.append(
            "A corpus of WikiText's tokenized release (`.tokens`) is not its raw split: rare words are `<unk>` in it, "
            "and its loss does not compare with published ones."
        )
    text += [
        f"Validation loss ended {course.rise:.4f} nats above its best of step {best.step:,.0f}. "
        f"{early_stop(curve['validation_loss'].tolist())} It is recorded here, and was not acted on.",
        "Gate norms (L2 norm of an expert's row of the router) and balance loss, divided by top_k so that 1 is ideal, "
        "of the best checkpoint:",
        table(["layer", "min", "max", "mean", "spread", "balance loss"], by_layer),
        _export(results.export),
        _training_time(results.training_timing),
    ]
    return "\n\n".join(text)


def early_stop(losses: list[float]) -> str:
    """Where early stopping would have ended a run with these validation losses, the one before the first step first."""
    best = 0
    for index, loss in enumerate(losses):
        if loss < losses[best]:
            best = index
        elif index - best == PATIENCE:
            return f"With a patience of {PATIENCE} validations it would have stopped at validation {index}."
    return f"With a patience of {PATIENCE} validations it would not have stopped early."


def _export(export: Record | None) -> str:
    if export is None:
        return f"Export: {_missing('export_experts')}"
    failed = [name.replace("_", " ") for name, passed in export["checks"].items() if passed is not True]
    return (
        f"Exported: {export['expert_files']} experts of {size(export['expert_file_bytes'])} and a backbone of "
        f"{size(export['backbone_file_bytes'])}, {size(export['total_bytes'])} in all; "
        + (f"**failed**: {', '.join(failed)}." if failed else "every check passed.")
    )


def _training_time(timing: Record | None) -> str:
    if timing is None:
        return f"Time: {_missing('train_dwr')}"
    return (
        f"All steps took {duration(timing['seconds'])}, {timing['tokens_per_second']:,.0f} tokens/s with reading and "
        f"recording, without validation; peak memory {size(timing['peak_memory_bytes'])}."
    )


def _speed(results: Results) -> str:
    if results.speed is None:
        return _missing("benchmark_moe")
    training, card = results.speed["training"], results.speed["machine"]["processor"]
    peak = results.cards[card]["bf16_tflop_per_second"] * 1e12 if card in results.cards else None
    rows, failed = [], []
    for name, model in training["models"].items():
        if "failed" in model:
            failed.append(f"`{name}` could not be trained: {model['failed']}.")
            continue
        utilisation = peak and model["tokens_per_second"] * training["flops_per_token"] / peak
        rows.append(
            [
                *(f"`{name}`", f"{model['parameters']:,}", f"{model['milliseconds']:.2f} ms"),
                f"{model['tokens_per_second']:,.0f}",
                NONE if utilisation is None else f"{utilisation:.1%}",
                NONE if model["peak_memory_bytes"] is None else size(model["peak_memory_bytes"]),
            ]
        )
    ratios = [
        f"{name.replace('_to_', ' to ')} {found['ratio']:.3f} ({low:.3f}–{high:.3f})"
        for name, found in training["tokens_per_second_ratios"].items()
        for low, high in [found["quartiles"]]
    ]
    layers = [
        [f"{row['tokens']:,}", row["layer"], f"{row['milliseconds']:.2f} ms", f"{row['ratio_to_dense']:.2f}"]
        for row in results.speed["rows"]
        if "failed" not in row
    ]
    failed += [f"`{row['layer']}` failed: {row['failed']}." for row in results.speed["rows"] if "failed" in row]
    source = results.cards[card]["source"] if peak else None
    return "\n\n".join(
        [
            f"Whole optimizer steps of {training['tokens_per_step']:,} tokens in {training['precision']}, of models "
            "that take turns.",
            table(["model", "parameters", "one step", "tokens/s", "model FLOPs utilisation", "peak memory"], rows),
            *failed,
            f"Tokens/s, medians over rounds with quartiles: {'; '.join(ratios)}.",
            f"Utilisation: {training['flops_per_token']:,} FLOPs a token (6 N + 12 L D T, with N the active parameters "
            "but for the embedding table, attention counted in full), against "
            + (f"{peak / 1e12:g} TFLOP/s in bf16 ({source})." if peak else f"a peak that is not known of {card}."),
            "One MoE layer, forward and backward, against a dense FFN of the same FLOPs:",
            table(["tokens", "layer", "time", "ratio to dense"], layers),
        ]
    )


def _cache(cache: Record | None) -> str:
    if cache is None:
        return _missing("benchmark_gpu_cache")
    low, high = cache["resident_tokens_per_second_range"]
    inexact = cache["decodings_with_a_logit_not_equal_to_the_bit"]
    prefetchers = list(dict.fromkeys(row["prefetch"] for row in cache["rows"]))
    places = dict.fromkeys(row["experts_in"] for row in cache["rows"])
    parts = [
        f"Run `{cache['run']}`, fp32, batch 1: {count(cache['prompts'], 'prompt')} of {cache['prompt_tokens']} tokens "
        f"and {count(cache['new_tokens'], 'token')} after each, {count(cache['repeats'], 'repeat')}; every cache is "
        f"empty at first. All {cache['experts']} experts resident: {cache['resident_tokens_per_second']:,.0f} tokens/s "
        f"({low:,.0f}–{high:,.0f}).",
        f"In all {cache['decodings']} decodings the most probable token of every position was the resident model's; "
        + ("all logits were equal to the bit." if not inexact else f"in {inexact} of them some logit differed."),
    ]
    for place in places:
        found = {
            (row["capacity"], row["policy"], row["prefetch"]): row
            for row in cache["rows"]
            if row["experts_in"] == place
        }
        rows = [
            [f"{capacity}", policy, *(_cell(found[capacity, policy, prefetch]) for prefetch in prefetchers)]
            for capacity, policy in dict.fromkeys(key[:2] for key in found)
        ]
        parts += [f"**Experts in: {place}.** Tokens/s (ratio to resident; hit rate; stall a token), by prefetching:"]
        parts += [table(["capacity", "policy", *prefetchers], rows)]
    at_a_third = [
        [
            *(row["experts_in"], row["policy"], row["prefetch"], f"{row['ratio_to_resident']:.3f}"),
            *(f"{row['hit_rate']:.3f}", f"{row['reads_per_token']:.2f}", f"{row['stall_ms_per_token']:.3f} ms"),
        ]
        for row in _at_a_third(cache)
    ]
    header = ["experts in", "policy", "prefetching", "to resident", "hit rate", "experts read a token", "stall a token"]
    parts += [f"Stall is time that decoding waited for experts. At {cache['capacity_nearest_a_third']} of them:"]
    return "\n\n".join([*parts, table(header, at_a_third)])


def _cell(row: Record) -> str:
    stall = f"{row['stall_ms_per_token']:.2f} ms"
    return f"{row['tokens_per_second']:,.0f} ({row['ratio_to_resident']:.2f}; {row['hit_rate']:.2f}; {stall})"


def _dag(dag: Record | None) -> str:
    if dag is None:
        return _missing("benchmark_dag")
    return "\n\n".join(
        [
            "Dense is transformers' own forward, backward to its embeddings; ours and the reference, which "
            f"concatenates all earlier head outputs at every layer, go backward to the gates. {dag['dtype']}, random "
            f"weights; candidates take turns, a ratio is the median over {dag['rounds']} rounds. Memory is beside the "
            f"weights. A copy moves {dag['copy_gigabytes_per_second']:,.0f} GB/s here, which the bound by bytes is "
            "worked out from.",
            *(_dag_size(result) for result in dag["results"]),
        ]
    )


def _dag_size(result: Record) -> str:
    failed = [f"{name.replace('_', ' ')} failed: {reason}." for name, reason in result["failed"].items()]
    if not result["candidates"]:
        return f"**{_shape(result)}**\n\nNot measured: {' '.join(failed)}"
    rows = [
        [
            name.replace("_", " "),
            *(
                f"{row[part]['milliseconds']:.2f} ms ({row[part]['ratio_to_dense']:.2f})"
                for part in ("forward", "forward_backward")
            ),
            *(
                size(row[part] * 2**20) if part in row else NONE
                for part in ("forward_peak_mib", "forward_backward_peak_mib")
            ),
        ]
        for name, row in result["candidates"].items()
    ]
    header = ["", "forward (to dense)", "forward + backward (to dense)", "peak, forward", "peak, forward + backward"]
    bounds = result["bounds"]
    verdict = (
        f"Bound by FLOPs {bounds['flop_bound']:.2f}, by bytes {bounds['squares_byte_bound']:.2f} of dense; ours "
        f"reaches {result['fraction_of_byte_bound']:.0%} of the bound by bytes."
    )
    return "\n\n".join([f"**{_shape(result)}**", table(header, rows), " ".join([*failed, verdict])])


def _shape(result: Record) -> str:
    sizes = result["size"]
    return f"{sizes['L']} layers, {sizes['H']} heads, width {sizes['D']:,}, batch {sizes['B']}, {sizes['T']:,} tokens"


def _step(results: Results) -> str:
    theirs, step = results.published_timing, results.step
    published = (
        f"Published: about {theirs['seconds_per_step']} s on {theirs['hardware']} ({theirs['source']}; batch "
        f"{theirs['batch_size']} in micro-batches of {theirs['micro_batch_size']})."
    )
    if step is None:
        return f"{_missing('benchmark_dagformer_step')} {published}"
    both = step["step"]["milliseconds"] + step["encoder"]["milliseconds"]
    parameters = ", ".join(f"{name} {number:,}" for name, number in step["parameters"].items())
    rows = [
        [name, f"{step[key]['milliseconds']:.1f} ms"]
        for name, key in (("training step", "step"), ("encoder, forward", "encoder"))
    ]
    return "\n\n".join(
        [
            f"Batch {step['batch_size']} in micro-batches of {step['micro_batch_size']}, {step['seq_len']:,} tokens, "
            f"{step['dtype']}; parameters: {parameters}; peak memory {size(step['peak_memory_bytes'])}.",
            table(["", "time"], [*rows, ["both", f"{both:.1f} ms"]]),
            "Our training reads vectors that were encoded once, so that a step is the first line; one that encodes its "
            f"texts at every step takes both. {published}",
            _scaled(results.cards, step["machine"]["processor"], both, theirs["seconds_per_step"]),
        ]
    )


def _scaled(cards: Record, card: str, milliseconds: float, published_seconds: float) -> str:
    """The step as it would be on the other card if it were bound by FLOPs, or by bytes."""
    if card not in cards:
        return f"`gpu/cards.yaml` has no published peaks of {card}, so that this does not compare with {STEP_CARD}."
    ours, other = cards[card], cards[STEP_CARD]
    factors = {
        "FLOPs": ours["bf16_tflop_per_second"] / other["bf16_tflop_per_second"],
        "bytes": ours["gb_per_second"] / other["gb_per_second"],
    }
    scaled = {name: factor * milliseconds / 1e3 for name, factor in factors.items()}
    low, high = sorted(published_seconds / seconds for seconds in scaled.values())
    return (
        f"{card} has {factors['FLOPs']:.1f} times the bf16 FLOP/s of {STEP_CARD} ({ours['bf16_tflop_per_second']:g} "
        f"and {other['bf16_tflop_per_second']:g} TFLOP/s) and {factors['bytes']:.1f} times its bandwidth "
        f"({ours['gb_per_second']:,} and {other['gb_per_second']:,} GB/s; {ours['source']}, {other['source']}). At the "
        f"same share of the peaks both together would take {scaled['FLOPs']:.2f} s there if bound by FLOPs, "
        f"{scaled['bytes']:.2f} s if by bytes: the published step is {low:.1f} to {high:.1f} times as long."
    )


def _missing(stage: str) -> str:
    return f"Not measured: not yet run on a GPU (`dvc repro gpu/dvc.yaml:{stage}`)."
