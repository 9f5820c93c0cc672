"""Inference with a cache of experts in the DWR report: exactness and hit rates. More is on a page of its own."""

from dynaroute.reporting.dwr.results import Results, num_experts
from dynaroute.reporting.tables import count, figure, size, table


def cached_inference(results: Results) -> str:
    """Hit rates by capacity and policy without prefetching, and whether logits are the resident model's."""
    total, config, summary = num_experts(results.run), results.run["config"], results.cache_summary
    plain = results.cache[results.cache["prefetch"] == "none"]
    rows = [
        [
            f"{row.capacity:,}",
            f"{row.capacity / total:.3f}",
            f"`{row.policy}`",
            f"{row.decode_hit_rate:.3f}",
            f"{row.prefill_hit_rate:.3f}",
            f"{row.evictions:,}",
            size(row.misses * summary["expert_file_bytes"]),
        ]
        for row in plain.itertuples()
    ]
    header = ["capacity (experts)", "c/N", "policy", "hit rate, decode", "hit rate, prefill", "evictions", "read"]
    return "\n\n".join(
        [
            f"The backbone is in memory, and at most as many of the {total} experts as the capacity says; one that is "
            "needed and not there is read from its file, and takes the place of another by the policy.",
            f"{count(summary['prompts'], 'prompt')} of {summary['prompt_tokens']} tokens from the test split, each "
            f"with the {count(summary['new_tokens'], 'token')} that follow it there, read one by one, and alone. "
            f"{exactness_sentence(results)}",
            figure("figures/dwr_cache_hit_rate.png", "Hit rate by capacity, on a trace of held-out text."),
            table(header, rows),
            "A request is one expert that one forward pass of a layer needs, for any number of tokens. Prefill is the "
            "pass over the prompt, decode the passes over one token each. Every prompt meets an empty cache. c/N is "
            "the share of experts held.",
            f"{hit_rate_sentence(results)} One token needs top_k experts in every layer, "
            f"{config['top_k'] * config['num_layers']} in all: a cache for fewer keeps next to nothing from one token "
            "to the next if it lets go of the least recently used.",
            "Policies, prefetching, precision, peers and other machines: [cached inference](cached_inference.md). "
            "Speed and memory of this run: [what was measured](dwr_measured.md).",
        ]
    )


def exactness_sentence(results: Results) -> str:
    """Whether the benchmark found the cached model's logits equal to the resident one's."""
    checks = results.cache_summary["checks"]
    failed = [name.replace("_", " ") for name, passed in checks.items() if passed is not True]
    if failed:
        return f"**Not exact**: failed in the benchmark: {', '.join(failed)}."
    return f"The benchmark checked that {', and that '.join(name.replace('_', ' ') for name in checks)}."


def hit_rate_sentence(results: Results) -> str:
    """What online policies hit at the capacity nearest to a third of the experts, against uniform routing."""
    found, total = results.simulation, num_experts(results.run)
    capacity, uniform = found["capacity_nearest_a_third"], found["uniform_hit_rate"]
    rates = [
        f"{rate:.3f} with `{policy}` ({uniform[policy]:.3f})"
        for policy, rate in found["hit_rate"].items()
        if policy != "min"
    ]
    return (
        f"With {capacity} of {total} experts held, the hit rate of {count(found['tokens'], 'token')} of the test text, "
        f"replayed one by one, is {', '.join(rates)}; in parentheses that of the same policy if routing is uniform and "
        f"independent, of which no online policy can expect more than c/N = {capacity / total:.3f}."
    )
