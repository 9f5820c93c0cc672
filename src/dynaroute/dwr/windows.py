"""Which windows of the test split are read for traces and for the cache benchmark.

Raises DynarouteError if there are fewer than the settings ask for; so train_dwr calls these before it trains.
"""

from dynaroute.config.dwr import BenchmarkCache, TraceRouting
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset, evenly_spaced


def traced_windows(shards: TokenShards, seq_len: int, settings: TraceRouting) -> Subset:
    """The windows whose routing is recorded."""
    return evenly_spaced(Windows(shards, seq_len, keep_tail=False), settings.windows, "trace_routing.windows")


def benchmark_windows(shards: TokenShards, settings: BenchmarkCache) -> Subset:
    """The texts that the cache benchmark reads: prompts and the tokens after them."""
    windows = Windows(shards, settings.prompt_tokens + settings.new_tokens, keep_tail=False)
    return evenly_spaced(windows, settings.num_prompts, "benchmark_cache.num_prompts")
