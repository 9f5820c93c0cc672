"""Generates text with a bounded number of experts in memory; the others stay on disk until they are needed.

    python -m dynaroute.dwr.generate --store data/dwr/expert_store --prompt "The function returns" --cache 11

Prints the text to stdout as it is generated, and a summary of what the cache did to stderr. Greedy text
(`--temperature 0`, the default) and text sampled with a seed are the same at every cache size, with every policy and
prefetcher, and equal those of the resident model. A hit is an expert that was in the cache, or being prefetched, when
it was needed; it is late if it was not read yet. Greedy text of a small model repeats itself: it needs the same experts
again, and hits more than other text. Ctrl-C ends with the summary so far and status 130; a reader that closes the pipe,
as `head` does, ends with status 141.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import get_args

import torch

from dynaroute.config.dwr import PolicyName, PrefetchName
from dynaroute.config.schema import MAX_SEED, MAX_THREADS, TEMPERATURES
from dynaroute.data.text.sources import valid_unicode
from dynaroute.data.tokens.tokenizers import Tokenizer, load_tokenizer
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics
from dynaroute.dwr.experts.store import TOKENIZER, ExpertStore
from dynaroute.dwr.inference import bind_experts, load_backbone, load_resident, routers, sample
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.terminal import program


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="folder written by export_experts")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate at most (default: %(default)s)")
    parser.add_argument("--cache", type=int, metavar="N", help="experts in memory (default: all, resident)")
    parser.add_argument("--per-layer", action="store_true", help="equal budgets for all layers instead of a shared one")
    parser.add_argument("--policy", choices=get_args(PolicyName), help="(default: lru)")
    parser.add_argument("--prefetch", choices=get_args(PrefetchName), help="(default: none)")
    parser.add_argument("--lookahead", type=int, metavar="M", help="experts to prefetch (default: the model's top_k)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that compute; reading has its own (default: 1)")
    return parser.parse_args()


def check(arguments: argparse.Namespace, store: ExpertStore) -> None:
    """Refuses values out of range, and options that need another one.

    Raises:
        DynarouteError: naming the first of them.
    """
    experts, cached, temperature = store.config.num_experts, arguments.cache, arguments.temperature
    coldest, hottest = TEMPERATURES
    for name, holds, allowed in (
        ("tokens", arguments.tokens > 0, "must be positive"),
        ("threads", 0 < arguments.threads <= MAX_THREADS, f"must be 1 to {MAX_THREADS}"),
        ("cache", cached is None or cached <= store.num_experts, f"the model has {store.num_experts} experts in all"),
        (
            "temperature",
            temperature == 0 or coldest <= temperature <= hottest,
            f"must be 0, or {coldest:g} to {hottest:g}",
        ),
        ("top_p", 0 < arguments.top_p <= 1, "must be above 0 and at most 1"),
        ("seed", 0 <= arguments.seed <= MAX_SEED, f"must be 0 to {MAX_SEED}"),
        ("lookahead", arguments.lookahead is None or 0 < arguments.lookahead <= experts, f"must be 1 to {experts}"),
        ("device", arguments.device == "cpu" or torch.cuda.is_available(), "there is no such device here"),
    ):
        if not holds:
            raise DynarouteError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: {allowed}")
    for name, given in (
        ("--per-layer", arguments.per_layer),
        ("--policy", arguments.policy),
        ("--prefetch", arguments.prefetch),
        ("--lookahead", arguments.lookahead),
    ):
        if given and arguments.cache is None:
            raise DynarouteError(f"{name}: needs --cache N")
    if arguments.lookahead and arguments.prefetch in (None, "none"):
        raise DynarouteError("--lookahead: needs --prefetch frequency, transition or gate")


def stream(tokenizer: Tokenizer, tokens: Iterator[int], ids: list[int]) -> None:
    """Prints text as its tokens come, up to the end of the text, and adds them to `ids`."""
    printed = 0
    for token in tokens:
        if token == tokenizer.eot_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            print(text[printed:], end="", flush=True)
            printed = len(text)
    print(tokenizer.decode(ids)[printed:])


def summary(tokens: int, seconds: float, statistics: CacheStatistics | None, file_bytes: int) -> str:
    """Time and cache statistics in one line."""
    line = f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s)"
    if statistics is None:
        return f"{line}; all experts resident"
    ahead = f", of which {statistics.reads_ahead * file_bytes / 2**20:.1f} ahead" if statistics.prefetched else ""
    late = f", {statistics.late} of the hits late" if statistics.prefetched else ""
    return (
        f"{line}; hit rate {statistics.hit_rate:.3f} of {statistics.requests} requests{late}; "
        f"{statistics.reads * file_bytes / 2**20:.1f} MiB read{ahead}; "
        f"waited {statistics.wait_seconds:.3f} s for experts"
    )


def generate(arguments: argparse.Namespace) -> None:
    """Generates and prints.

    Raises:
        DynarouteError: the arguments or the store are not usable.
    """
    store = ExpertStore(arguments.store)
    check(arguments, store)
    tokenizer = load_tokenizer(store.path / TOKENIZER)
    if tokenizer.vocab_size > store.config.vocab_size:  # not hashed before format 4
        raise DynarouteError(
            f"{store.path / TOKENIZER}: has {tokenizer.vocab_size} tokens, but the model has {store.config.vocab_size}"
        )
    prompt = tokenizer.encode_batch([valid_unicode(arguments.prompt)])[0].tolist() or [tokenizer.eot_id]
    if len(prompt) >= store.config.max_seq_len:
        raise DynarouteError(f"--prompt: {len(prompt)} tokens; the model has {store.config.max_seq_len} positions")
    torch.set_num_threads(arguments.threads)
    cache = None
    if arguments.cache is None:
        model = load_resident(store, arguments.device)
    else:
        model = load_backbone(store, arguments.device)
        policy = make_policy(arguments.policy or "lru", store.usage.load)
        lookahead = arguments.lookahead or store.config.top_k
        prefetcher = make_prefetcher(arguments.prefetch or "none", store, routers(model), lookahead)
        cache = ExpertCache(store, arguments.cache, policy, arguments.per_layer, prefetcher, arguments.device)
        bind_experts(model, cache)
    generator = torch.Generator().manual_seed(arguments.seed)
    ids: list[int] = []
    interrupted = False
    with nullcontext() if cache is None else cache:
        started = time.perf_counter()
        allowed = torch.from_numpy(tokenizer.ids)
        tokens = sample(model, prompt, arguments.temperature, arguments.top_p, generator, allowed)
        try:
            stream(tokenizer, itertools.islice(tokens, min(arguments.tokens, store.config.max_seq_len)), ids)
        except KeyboardInterrupt:
            print(flush=True)  # ends the unfinished line
            interrupted = True
        seconds = time.perf_counter() - started
    statistics = None if cache is None else cache.statistics
    print(summary(len(ids), seconds, statistics, store.file_bytes), file=sys.stderr)
    if interrupted:
        sys.exit(130)


def main() -> None:
    """The command. Ends with one line and status 1 when the user is at fault."""
    with program("generate"):
        try:
            generate(parse_arguments())
        except KeyboardInterrupt:  # before there was anything to sum up
            sys.exit(130)


if __name__ == "__main__":
    main()
