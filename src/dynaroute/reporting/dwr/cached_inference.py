"""Inference with a cache of experts: exactness and hit rates. Speed and memory are `measured.py`'s."""

from dynaroute.reporting.dwr.results import Results, num_experts
from dynaroute.reporting.tables import count, figure, size, table


def cached_inference(results: Results) -> str:
    """Hit rates by capacity, and whether logits are the resident model's."""
    total, config, summary = num_experts(results.run), results.run["config"], results.cache_summary
    rows = [
        [
            f"{row.capacity:,}",
            f"{row.capacity / total:.3f}",
            _start(row.warm_start),
            f"{row.decode_hit_rate:.3f}",
            f"{row.prefill_hit_rate:.3f}",
            f"{row.evictions:,}",
            size(row.bytes_read),
        ]
        for row in results.cache.itertuples()
    ]
    header = ["capacity (experts)", "c/N", "start", "hit rate, decode", "hit rate, prefill", "evictions", "read"]
    return "\n\n".join(
        [
            f"The backbone is in memory, and at most as many of the {total} experts as the capacity says; one that is "
            "needed and not there is read from its file, and takes the place of the least recently used.",
            f"{count(summary['prompts'], 'prompt')} of {summary['prompt_tokens']} tokens from the test split, each "
            f"continued by {count(summary['new_tokens'], 'token')}, greedily and alone. {exactness_sentence(results)}",
            figure("figures/dwr_cache_hit_rate.png", "Hit rate by capacity, in decoding and in prefill."),
            table(header, rows),
            "A request is one expert that one forward pass of a layer needs, for any number of tokens. Prefill is the "
            "pass over the prompt, decode the passes over one token each. A warm start fills the cache with the "
            "experts used most on the validation split; it is counted in what was read, not as requests. c/N is the "
            "share of experts held, and what any policy can expect to hit if routing is uniform and independent.",
            f"{hit_rate_sentence(results)} One token needs top_k experts in every layer, "
            f"{config['top_k'] * config['num_layers']} in all: a cache for fewer keeps next to nothing from one token "
            "to the next, since it lets go of the least recently used.",
            "Speed and memory: [what was measured](dwr_measured.md).",
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
    """Decoding's hit rate at the capacity nearest to a third of the experts, against c/N."""
    total, capacity = num_experts(results.run), results.cache_summary["capacity_nearest_a_third"]
    rates = [
        f"{row.decode_hit_rate:.3f} after a {_start(row.warm_start)} start"
        for row in results.cache[results.cache["capacity"] == capacity].itertuples()
    ]
    return (
        f"With {capacity} of {total} experts held (c/N = {capacity / total:.3f}), the hit rate of decoding is "
        f"{' and '.join(rates)}."
    )


def _start(warm: bool) -> str:
    return "warm" if warm else "cold"
