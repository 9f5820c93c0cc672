"""reports/cached_inference.md: what caching experts costs and gains, by policy, prefetcher, precision and machine.

Every number is read from a file that a stage wrote, and every verdict follows from a rule that stands beside it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dynaroute.reporting.dwr.results import REPORTS, read_cache, read_simulated_hits, read_speeds
from dynaroute.reporting.inputs import Record, check_same_run, read_csv, read_record
from dynaroute.reporting.tables import NONE, count, figure, size, table

if TYPE_CHECKING:
    import pandas as pd

PEERS = Path("reports/benchmarks/cached_inference.json")
RATES = ["hit_rate", "uniform_hit_rate"]  # of the trace, and of as many tokens that are routed uniformly
GOAL = 1 / 3  # of the gap between LRU and MIN
NEAR = 0.9  # of the resident speed


class Results(NamedTuple):
    """What the page is made from; all of one run but for the peers, who have random weights."""

    export: Record
    cells: "pd.DataFrame"  # cache.csv: real decoding
    measured: "pd.DataFrame"  # cache_timing.csv: the same cells
    summary: Record  # cache.json
    hits: "pd.DataFrame"  # simulated_hits.csv: the replayed trace
    speeds: "pd.DataFrame"  # simulated_speed.csv
    simulation: Record
    peers: Record | None  # of a target that the default pipeline does not run


def read_results() -> Results:
    """Reads everything.

    Raises:
        DynarouteError: a file is missing, damaged or of another run.
    """
    export, summary = read_record(REPORTS / "export.json"), read_record(REPORTS / "cache.json")
    simulation = read_record(REPORTS / "simulation.json")
    check_same_run(export["run"], summary, simulation, read_record(REPORTS / "cache_timing.json"))
    names = ["machine", "model", "policy", "prefetch"]
    speeds = read_csv(REPORTS / "simulated_speed.csv", ["capacity", "hit_rate", "ratio_to_resident"], names=names)
    peers = read_record(PEERS) if PEERS.exists() else None
    _, measured = read_speeds()
    return Results(export, read_cache(), measured, summary, read_simulated_hits(), speeds, simulation, peers)


def page(results: Results) -> str:
    """The page as Markdown."""
    total, third = results.summary["experts"], results.summary["capacity_nearest_a_third"]
    parts = [
        "# Cached inference",
        f"Experts of the model of run `{results.export['run']}`, held in a bounded amount of memory and read from "
        "their files when they are needed, or before. Made by `dvc repro report_cached_inference`; the peers by "
        "`dvc repro benchmarks/dvc.yaml:benchmark_cached_inference`. The bytes of section 2 and all of section 4 are "
        "measured, and differ from run to run; everything else is the same on every run.",
        *("## At a glance", _at_a_glance(results)),
        *("## 1. Hit rates by budget", _budgets(results, total)),
        *("## 2. Policies and prefetching in real decoding", _cells(results, third)),
        *("## 3. Lower precision on disk", _precisions(results.export)),
        *("## 4. Peers, and the cost of a miss", _peers(results.peers)),
        *("## 5. Other machines and models", _machines(results.speeds, results.simulation["capacity_nearest_a_third"])),
        *("## 6. Which setting for which budget", _recommendation(results)),
        "How hit rates depend on the balance loss that a model was trained with: [DWR runs](dwr_runs.md).",
    ]
    return "\n\n".join(parts) + "\n"


def _at_a_glance(results: Results) -> str:
    checks = [*results.summary["checks"].items(), *results.simulation["checks"].items()]
    failed = [name.replace("_", " ") for name, passed in checks if passed is not True]
    lines = [
        f"**Failed**: {', '.join(failed)}." if failed else "Every check passed: " + _listed(name for name, _ in checks),
        gap_sentence(results.simulation, results.hits),
        *(_goal(goal, results.peers) for goal in (results.peers["goals"] if results.peers else [])),
    ]
    return "\n".join(f"- {line}" for line in lines)


def gap_closed(hits: "pd.DataFrame", per_layer: bool) -> "pd.DataFrame":
    """The share of the gap between LRU and MIN that each other policy closes, by capacity; NaN where there is none."""
    rates = hits[hits["per_layer"] == per_layer].pivot(index="capacity", columns="policy", values="hit_rate")
    if "lru" not in rates:
        return rates.iloc[:, :0]
    others = [name for name in hits["policy"].unique() if name not in ("lru", "min")]
    gap = rates["min"] - rates["lru"]
    return rates[others].sub(rates["lru"], axis=0).div(gap.where(gap > 0), axis=0)


def gap_sentence(simulation: Record, hits: "pd.DataFrame") -> str:
    """How much of the gap between LRU and MIN the best online policy closes, whether that is a third, and how much it
    closes elsewhere."""
    closed = {name: share for name, share in simulation["share_of_gap_closed"].items() if name != "min"}
    if not closed:
        return "There is no gap between LRU and MIN to close, or LRU was not replayed."
    best, rates = max(closed, key=closed.__getitem__), simulation["hit_rate"]
    third = simulation["capacity_nearest_a_third"]
    others, layered = gap_closed(hits, False)[best].drop(third).dropna(), gap_closed(hits, True)
    elsewhere = [f"{share:.0%} at {capacity:,}" for capacity, share in others.items()]
    if best in layered and third in layered.index:
        elsewhere.append(f"{layered[best][third]:.0%} at {third} with equal shares for the layers")
    return (
        f"At {third} experts, without prefetching, `{best}` closes "
        f"{closed[best]:.0%} of the gap between LRU ({rates['lru']:.3f}) and MIN ({rates['min']:.3f}): the goal of a "
        f"third is {'reached' if closed[best] >= GOAL else 'not reached'}."
        + (f" Elsewhere it closes {', '.join(elsewhere)}." if elsewhere else "")
    )


def _goal(goal: Record, peers: Record) -> str:
    missed = "" if goal["value"] >= goal["goal"] else f" {_reason(goal, peers)}"
    return (
        f"{goal['page_cache']} page cache, {goal['candidate']}, to {goal['against']}: {_with_range(goal)}, goal "
        f"{goal['goal']:g}: {'**not reached**' if missed else 'reached'}.{missed}"
    )


def _with_range(goal: Record) -> str:
    return f"{goal['value']:.2f} ({goal['lowest']:.2f}–{goal['highest']:.2f})"


def _reason(goal: Record, peers: Record) -> str:
    """Why a goal was missed, as far as other measurements of the same target tell."""
    if goal["resident_value"] < goal["goal"]:
        return (
            f"All experts resident reach {goal['resident_value']:.2f} themselves: with the same kernels a cache cannot "
            "be expected to do better."
        )
    rows = {(row["name"], row["page_cache"]): row for row in peers["rows"]}
    own, resident, use = rows[goal["candidate"], goal["page_cache"]], peers["rows"][0], peers["use_of_an_expert_ms"]
    more = use["on disk" if goal["page_cache"] == "cold" else "in the page cache"] - use["held"]
    missing, late = (1 - own["hit_rate"]) * peers["experts_per_token"], own.get("late_rate")
    found = f"A token misses {missing:.1f} of its {peers['experts_per_token']} experts"
    cost = f"{missing * more:.1f} ms"
    if late is None:  # a file of before they were counted
        found = found.replace("misses", "misses at least")
        found += "; hits that were not read yet when they were asked for, as prefetching has them, were not counted"
        cost = f"at least {cost}"
    elif late:
        found += f", and {late * peers['experts_per_token']:.1f} of those that it hits are late, not read yet"
        cost = f"{cost}, and up to {late * peers['experts_per_token'] * more:.1f} ms more for late ones"
    return (
        f"{found}. One that is read as it is needed takes {more:.2f} ms more than one that is held: {cost}, where a "
        f"token takes {1000 / own['tokens_per_second']:.1f} ms in place of "
        f"{1000 / resident['tokens_per_second']:.1f} ms with all experts resident. What reads do not explain of it is "
        "bookkeeping, reading threads beside the computation, and what differs between repetitions, whose range stands "
        "beside the ratio: these were not measured apart."
    )


def _budgets(results: Results, total: int) -> str:
    one_budget, policies = results.hits[~results.hits["per_layer"]], list(results.hits["policy"].unique())
    rates, uniform = (one_budget.pivot(index="capacity", columns="policy", values=name)[policies] for name in RATES)
    rows = [[f"{capacity:,}", *(f"{rate:.3f}" for rate in row)] for capacity, row in rates.iterrows()]
    yardsticks = [
        [f"{capacity:,}", f"{capacity / total:.3f}", *(f"{rate:.3f}" for rate in row)]
        for capacity, row in uniform.iterrows()
    ]
    third, shared = results.simulation["capacity_nearest_a_third"], gap_closed(results.hits, per_layer=False)
    layered = gap_closed(results.hits, per_layer=True)
    gaps = [
        [f"{capacity:,}", *(_share(share) for share in row)]
        for capacity, row in zip(shared.index, shared.to_numpy(), strict=True)
    ]
    at_a_third = []
    own = results.hits[results.hits["per_layer"]].set_index("policy")
    for name, rate in results.simulation["hit_rate"].items():
        row = [f"`{name}`", f"{rate:.3f}", f"{results.simulation['uniform_hit_rate'][name]:.3f}"]
        row += [f"{own[values][name]:.3f}" if name in own.index else NONE for values in RATES]
        at_a_third.append([*row, _share(layered[name].get(third)) if name in layered else NONE])
    return "\n\n".join(
        [
            f"{count(results.simulation['tokens'], 'token')} of the test split, read one by one; every policy sees the "
            "same requests, and nothing is prefetched. MIN is told the requests to come: no policy can do better.",
            figure("figures/dwr_cache_hit_rate.png", "Hit rate by budget, one budget for all layers."),
            table(["budget (experts)", *(f"`{name}`" for name in policies)], rows),
            "What the same policies hit if routing is uniform and independent, on as many tokens that were drawn so "
            "once: the yardstick of each, since what it hits above it is due to this model's routing. c/N, the share "
            "of experts held, is the most that an online policy can expect of it:",
            table(["budget (experts)", "c/N", *(f"`{name}`" for name in policies)], yardsticks),
            "The share of the gap between LRU and MIN that a policy closes, by budget; below zero, it hits less than "
            "LRU:",
            table(["budget (experts)", *(f"`{name}`" for name in shared)], gaps),
            f"At {third} experts, with the budget cut into equal shares of the layers; the gap is then that between "
            "LRU and MIN with the same shares:",
            table(["policy", "one budget", "uniform", "per layer", "uniform", "gap closed, per layer"], at_a_third),
            "LRU evicts what was used longest ago, which is just what the next layers will ask for: that is why it "
            "may hit less than c/N of uniform routing. `next_use` ranks experts by how soon their layer comes again "
            "and by how likely it is to use them then: by their share of recent calls, and by how often they followed "
            "what the layer used last. Its discount, and the half-life that it shares with `weighted_lru`, are "
            "constants in the code. They were chosen on text of the validation split of the default run, which this "
            "trace is not of, at a third of the experts, and are not chosen again for another run, nor for another "
            "budget.",
        ]
    )


def _cells(results: Results, third: int) -> str:
    on_trace = results.speeds.groupby("prefetch")["accuracy"].first()  # whatever policy, capacity and machine
    warm = results.measured[results.measured["page_cache"] == "warm"]
    cells = results.cells[results.cells["capacity"] == third].merge(warm, on=["capacity", "policy", "prefetch"])
    rows = [
        [
            *(f"`{row.policy}`", row.prefetch, f"{row.decode_hit_rate:.3f}"),
            *(_share(row.accuracy), _share(on_trace[row.prefetch]), f"{row.prefetch_evictions:,}"),
            *map(size, (row.bytes_read, row.bytes_read_ahead, row.bytes_useful, row.bytes_late, row.bytes_wasted)),
        ]
        for row in cells.itertuples()
    ]
    m, summary = results.summary["lookahead"], results.summary
    header = ["policy", "prefetching", "hit rate, decode", f"accuracy at {m}", "of the trace"]
    header += ["evictions for prefetches", "read", "ahead", "useful", "late", "wasted"]
    return "\n\n".join(
        [
            f"{count(summary['prompts'], 'prompt')} of {summary['prompt_tokens']} tokens of the test split, each with "
            f"the {count(summary['new_tokens'], 'token')} that follow it there, read one by one, at {third} of "
            f"{summary['experts']} experts. In every cell all logits were compared with those of the resident model.",
            table(header, rows),
            f"Accuracy at {m}: the share of the experts that a token needed in a layer that were among the {m} that "
            "the layer before had foretold, in these texts while decoding and in the trace of section 1. Evictions "
            "for prefetches are of experts that made way for one; those for a miss are not among them. A hit is an "
            "expert that was there, or to be prefetched by then.",
            "The bytes are what was measured, with a warm page cache, and differ from run to run: what was to be "
            "prefetched is not read if its layer comes before its turn, or it has made way by then. Ahead is what "
            "prefetching read; of that, useful was used before it made way, and wasted was not. Late was hit before it "
            "was there: on its way, which is useful too, or not begun, which is then read on demand.",
        ]
    )


def _precisions(export: Record) -> str:
    exact = export["precisions"][0]["nll"]
    rows = [
        [row["precision"], size(row["expert_bytes"]), f"{row['nll']:.5f}", f"{row['nll'] - exact:+.5f}"]
        for row in export["precisions"]
    ]
    return (
        f"NLL in nats per token over {count(export['calibration_windows'], 'window')} of the validation split, with "
        f"the experts (not the backbone) stored in each precision. This store has {export['precision']}.\n\n"
        f"{table(['precision', 'one expert', 'NLL', 'loss'], rows)}\n\n"
        "bf16 and int8 (a scale for each output channel) are decoded to 32-bit floats when they are read: they save "
        "disk and reading, not memory. Cached and resident model agree to the bit in every precision."
    )


def _peers(peers: Record | None) -> str:
    if peers is None:
        return f"Not measured: `make benchmarks` does it, and writes `{PEERS}`."
    rows = [
        [
            *(row["name"], row["page_cache"], f"{row['tokens_per_second']:.1f}"),
            f"{row['ratio_to_resident']:.3f} ({row['ratio_lowest']:.3f}–{row['ratio_highest']:.3f})",
            *(NONE if row.get(rate) is None else f"{row[rate]:.3f}" for rate in ("hit_rate", "late_rate")),
        ]
        for row in peers["rows"]
    ]
    goals = [
        [
            *(goal["page_cache"], goal["against"], _with_range(goal)),
            *(f"{goal['goal']:g}", f"{goal['resident_value']:.2f}"),
        ]
        for goal in peers["goals"]
    ]
    miss = [[name, f"{milliseconds:.2f} ms"] for name, milliseconds in peers["use_of_an_expert_ms"].items()]
    machine = ", ".join(f"{key} {value}" for key, value in peers["machine"].items())
    return "\n\n".join(
        [
            f"{peers['experts']} experts of {size(peers['expert_bytes'])} with random weights, {peers['capacity']} of "
            f"them held, {count(peers['new_tokens'], 'token')} decoded at batch 1 by "
            f"{count(peers['threads'], 'thread')}; the cache's reading threads run beside it, on a second core where "
            f"there is one. Medians of {count(peers['repeats'], 'repetition')} in which all take turns, and ratios to "
            "the resident model of the same repetition, with their range. Warm, resident models included: just after "
            "the same decoding. Cold: before every token the system is made to forget all pages that are not in use. "
            "Random weights do not route uniformly, so the hit rate stands beside each speed, and the share of "
            "requests that were hits but late, not read yet (– where it was not measured). Measured on: "
            f"{machine}.",
            table(["", "page cache", "tokens/s", "relative to resident (range)", "hit rate", "late"], rows),
            *_told_apart(peers["rows"]),
            f"Mixtral is transformers' with equal expert bytes and experts mapped to disk (`device_map`). By its own "
            f"routing, LRU at the same capacity would hit {peers['mixtral_lru_hit_rate']:.3f}. Its resident form and "
            "ours differ in norms and gates; compare tokens/s. `disk_offload` is accelerate's, on our module.",
            f"The goals, for `{peers['goals'][0]['candidate']}`, a setting that was chosen before it was measured. "
            "Values are medians of the ratios of each repetition, with their range; beside them what all experts "
            "resident reach.",
            table(["page cache", "ours to", "value (range)", "at least", "all resident"], goals),
            "What it takes to use one expert once, which is a matrix-vector product and, where it is not held, "
            "reading it:",
            table(["the expert is", "median"], miss),
        ]
    )


def _told_apart(rows: list[Record]) -> Iterator[str]:
    """For each state of the page cache, which of our cached settings differ in speed by more than rounds do."""
    for state in dict.fromkeys(row["page_cache"] for row in rows):
        own = [row for row in rows if row["page_cache"] == state and row["hit_rate"] is not None]
        if len(own) < 2:
            continue
        apart = [
            f"{one['name']} is faster than {other['name']}"
            for one in own
            for other in own
            if one["ratio_lowest"] > other["ratio_highest"]
        ]
        rates = [row["hit_rate"] for row in own]
        found = "; ".join(apart) if apart else "none, so nothing follows from the order of their medians"
        yield (
            f"Of our {len(own)} cached settings with a {state} page cache, whose hit rates are {min(rates):.3f} to "
            f"{max(rates):.3f}, those told apart, with ranges that do not overlap: {found}."
        )


def _machines(speeds: "pd.DataFrame", third: int) -> str:
    speeds = speeds[speeds["capacity"] == third]
    prefetchers = list(speeds["prefetch"].unique())
    rows = [
        [
            machine,
            model,
            f"`{policy}`",
            *(f"{rows.set_index('prefetch')['ratio_to_resident'][p]:.3f}" for p in prefetchers),
        ]
        for (machine, model, policy), rows in speeds.groupby(["machine", "model", "policy"], sort=False)
    ]
    return (
        f"Simulated, not measured: the trace of this run at {third} experts, with the bandwidths and sizes that "
        "`simulate_cache` in params.yaml gives to each machine and model. Speed relative to all experts resident, by "
        "prefetcher:\n\n"
        f"{table(['machine', 'model', 'policy', *prefetchers], rows)}\n\n"
        "One channel brings one expert after another, what is needed before what is foretold; what is foretold and "
        "not begun when its layer comes is not brought, as in the cache itself. That reads both at the same time, and "
        "begins a read only when what makes way for it was used; and its bookkeeping takes time. Where the channel is "
        "the bottleneck, a prefetch that turns out wrong delays what is needed: there, prefetching loses although hit "
        "rates rise."
    )


def _recommendation(results: Results) -> str:
    online = results.hits[(results.hits["policy"] != "min") & ~results.hits["per_layer"]]
    places = list(results.speeds.groupby(["machine", "model"], sort=False).groups)
    fast: dict[tuple[str, str], list[int]] = {place: [] for place in places}  # budgets
    rows = []
    for capacity, cells in online.groupby("capacity"):
        most = cells.loc[cells["hit_rate"].idxmax()]
        row = [f"{capacity:,}", size(capacity * results.summary["expert_file_bytes"]), f"`{most['policy']}`"]
        row.append(f"{most['hit_rate']:.3f}")
        speeds = results.speeds
        speeds = speeds[(speeds["capacity"] == capacity) & (speeds["policy"] == most["policy"])]
        for machine, model in places:
            choices = speeds[(speeds["machine"] == machine) & (speeds["model"] == model)]
            best = choices.loc[choices["ratio_to_resident"].idxmax()]
            row.append(f"{best['ratio_to_resident']:.3f} ({best['prefetch']})")
            if best["ratio_to_resident"] >= NEAR:
                fast[machine, model].append(capacity)
        rows.append(row)
    header = ["budget (experts)", "memory", "policy", "hit rate", *(", ".join(place) for place in places)]
    enough = [f"{', '.join(place)}: {min(budgets) if budgets else 'none'}" for place, budgets in fast.items()]
    return "\n\n".join(
        [
            "For each budget, the online policy with the highest hit rate of section 1 with one budget for all layers, "
            "and with it, for each machine and model of section 5, the prefetcher with the highest simulated speed, "
            "relative to all experts resident. Memory is that of this run's experts.",
            table(header, rows),
            f"The smallest of these budgets with {NEAR:g} of the resident speed: {'; '.join(enough)}.",
        ]
    )


def _share(value: float | None) -> str:
    return NONE if value is None or value != value else f"{value:.1%}"


def _listed(names: Iterable[str]) -> str:
    return "; ".join(name.replace("_", " ") for name in names) + "."
