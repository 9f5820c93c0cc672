"""Generates with a bounded number of experts in memory; the others stay on disk until they are needed.

    python -m dynaroute.dwr.generate --store data/dwr/expert_store --prompt "The function returns" --cache 11
    python -m dynaroute.dwr.generate --model allenai/OLMoE-1B-7B-0924 --revision COMMIT --memory 4GiB --prompt "The"

A model is an expert store, or a checkpoint of transformers in a folder or on the hub, whose own shards are read (OLMoE,
Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, and DeepSeek-V3 in bf16: it is published in fp8). `--memory` bounds its
experts, pages of their files included; the rest of the model and the keys and values of the text come on top, and what
a pass over 128 tokens needs.

Prints the text to stdout as it is generated, and a summary of what the cache did to stderr. Greedy text
(`--temperature 0`, the default) and text sampled with a seed are the same at every cache size, with every policy and
prefetcher. A hit is an expert that was in the cache, or being prefetched, when it was needed; it is late if it was not
read yet. Greedy text of a small model repeats itself: it needs the same experts again, and hits more than other text.
`--cache-aware ALPHA` trades that exactness for hits: experts in memory are preferred by ALPHA logits, as far as they
were held when a layer is called. The summary then says "inexact". It compares the first 128 generated tokens with exact
routing, for which they are read once more: KL divergence and perplexity.
Ctrl-C ends with the summary so far and status 130 (with `--interactive`, at the next prompt); a reader that closes the
pipe, as `head` does, ends with status 141.
"""

import argparse
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import nn

from dynaroute.config.dwr import PolicyName, PrefetchName
from dynaroute.config.schema import MAX_SEED, MAX_THREADS, TEMPERATURES
from dynaroute.data.text.sources import valid_unicode
from dynaroute.data.tokens.tokenizers import load_tokenizer
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.checkpoint import CheckpointStore
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import Router, make_prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics
from dynaroute.dwr.experts.store import MANIFEST, TOKENIZER, ExpertStore
from dynaroute.dwr.experts.usage import UsageCounter, backbone_hash, load_profile
from dynaroute.dwr.hub import HubModel, locate_checkpoint
from dynaroute.dwr.inference import (
    Forward,
    Recording,
    Text,
    bind_experts,
    compare_routing,
    load_backbone,
    load_resident,
    routers,
    sample,
    start_text,
)
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.terminal import program

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COMPARED = 128  # tokens of inexact text, whose logits are kept
READING = 2  # threads that may read an expert at a time


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder of a checkpoint or an expert store, or an id of the hub")
    model.add_argument("--store", help="folder written by export_experts")
    parser.add_argument("--revision", help="commit of a model on the hub")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompts", metavar="FILE", help="a prompt in each line")
    prompt.add_argument("--interactive", action="store_true", help="prompts from stdin, each a text of its own")
    parser.add_argument("--chat", action="store_true", help="prompts are turns of a chat, by the model's own template")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate at most (default: %(default)s)")
    room = parser.add_mutually_exclusive_group()
    room.add_argument("--cache", type=int, metavar="N", help="experts in memory (default: all)")
    room.add_argument("--memory", metavar="SIZE", help="memory of experts, such as 4GiB")
    parser.add_argument("--per-layer", action="store_true", help="equal budgets for all layers instead of a shared one")
    parser.add_argument("--policy", choices=get_args(PolicyName), help="(default: lru)")
    parser.add_argument("--prefetch", choices=get_args(PrefetchName), help="(default: none)")
    parser.add_argument("--lookahead", type=int, metavar="M", help="experts to prefetch (default: the model's top_k)")
    parser.add_argument("--cache-aware", type=float, metavar="ALPHA", help="prefer held experts (default: 0, exact)")
    parser.add_argument("--usage", metavar="FILE", help="profile of earlier traffic, for policies and prefetchers")
    parser.add_argument("--save-usage", metavar="FILE", help="keep a profile of this traffic, on top of --usage")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that compute; reading has its own (default: 1)")
    return parser.parse_args()


class Served(NamedTuple):
    """A model that is ready to generate, its experts resident or to be bound to a cache of its store."""

    store: ExpertStore | CheckpointStore
    model: nn.Module
    positions: int
    text: Text
    start: Callable[[], Forward]  # a new text
    routers: list[Router]
    bind: Callable[[ExpertCache], None] | None  # None: all experts are resident


def check(arguments: argparse.Namespace) -> None:
    """Refuses values out of range, and options that need another one, as far as the model does not matter.

    Raises:
        DynarouteError: naming the first of them.
    """
    temperature, (coldest, hottest) = arguments.temperature, TEMPERATURES
    for name, holds, allowed in (
        ("tokens", arguments.tokens > 0, "must be positive"),
        ("lookahead", arguments.lookahead is None or arguments.lookahead > 0, "must be positive"),
        ("threads", 0 < arguments.threads <= MAX_THREADS, f"must be 1 to {MAX_THREADS}"),
        (
            "temperature",
            temperature == 0 or coldest <= temperature <= hottest,
            f"must be 0, or {coldest:g} to {hottest:g}",
        ),
        ("top_p", 0 < arguments.top_p <= 1, "must be above 0 and at most 1"),
        ("seed", 0 <= arguments.seed <= MAX_SEED, f"must be 0 to {MAX_SEED}"),
        ("cache_aware", 0 <= (arguments.cache_aware or 0) <= hottest, f"must be 0, which is exact, to {hottest:g}"),
        ("device", arguments.device == "cpu" or torch.cuda.is_available(), "there is no such device here"),
    ):
        if not holds:
            raise DynarouteError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: {allowed}")


def size_of(text: str) -> int:
    """Bytes of a size such as 4GiB. Raises DynarouteError for anything else."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if not found:
        raise DynarouteError(f"--memory {text}: must be a number with a unit: {', '.join(UNITS)}")
    return int(float(found[1]) * UNITS[found[2]])


def serve_store(arguments: argparse.Namespace, path: str) -> Served:
    """A model from an expert store.

    Raises:
        DynarouteError: the store is damaged, or has no chat template.
    """
    if arguments.chat:
        raise DynarouteError(f"--chat: {path} has no chat template")
    if arguments.revision:
        raise DynarouteError(f"--revision {arguments.revision}: {path} is a local folder, which has none")
    store = ExpertStore(path, drop_pages=arguments.memory is not None)
    tokenizer = load_tokenizer(store.path / TOKENIZER)
    if tokenizer.vocab_size > store.config.vocab_size:  # not hashed before format 4
        raise DynarouteError(
            f"{store.path / TOKENIZER}: has {tokenizer.vocab_size} tokens, but the model has {store.config.vocab_size}"
        )
    text = Text(
        encode=lambda prompt, chat: tokenizer.encode_batch([prompt])[0].tolist() or [tokenizer.eot_id],
        decode=tokenizer.decode,
        stop={tokenizer.eot_id},
        allowed=torch.from_numpy(tokenizer.ids),
    )
    resident = arguments.cache is None and arguments.memory is None
    model = (load_resident if resident else load_backbone)(store, arguments.device)
    return Served(
        store,
        model,
        store.config.max_seq_len,
        text,
        lambda: start_text(model),
        routers(model),
        None if resident else lambda cache: bind_experts(model, cache),
    )


def serve_checkpoint(arguments: argparse.Namespace) -> Served:
    """A model of transformers from its checkpoint. Raises DynarouteError if it is damaged or not supported."""
    hub = HubModel(locate_checkpoint(arguments.model, arguments.revision), arguments.device)
    return Served(hub.store, hub.model, hub.positions, hub.load_text(), hub.start_text, hub.routers(), hub.bind)


def make_cache(arguments: argparse.Namespace, served: Served) -> ExpertCache | None:
    """A cache of the size asked for, bound to the model; None if all experts are resident.

    Raises:
        DynarouteError: an option does not fit the model, or needs another one.
    """
    store, config = served.store, served.store.config
    if served.bind is None:
        for name in ("per_layer", "policy", "prefetch", "lookahead", "cache_aware", "usage", "save_usage"):
            if getattr(arguments, name):
                raise DynarouteError(f"--{name.replace('_', '-')}: needs --cache N or --memory SIZE")
        return None
    if arguments.lookahead and arguments.prefetch in (None, "none"):
        raise DynarouteError("--lookahead: needs --prefetch frequency, transition or gate")
    if arguments.lookahead and arguments.lookahead > config.num_experts:
        raise DynarouteError(f"--lookahead {arguments.lookahead}: must be 1 to {config.num_experts}")
    if arguments.cache is not None and arguments.cache > store.num_experts:
        raise DynarouteError(f"--cache {arguments.cache}: the model has {store.num_experts} experts in all")
    capacity = arguments.cache if arguments.cache is not None else store.num_experts
    if arguments.memory is not None:
        passing = READING * store.file_bytes if isinstance(store, ExpertStore) else 0  # mapped until they are copied
        capacity = (size_of(arguments.memory) - passing) // store.expert_bytes
        least = config.num_layers if arguments.per_layer else 1
        if capacity < least:
            needed = -(-(passing + least * store.expert_bytes) // 2**10)
            raise DynarouteError(f"--memory {arguments.memory}: must be at least {needed}KiB, for experts: {least}")
        capacity = min(capacity, store.num_experts)
    counter = None
    if arguments.usage or arguments.save_usage:
        model = backbone_hash(served.model)
        if arguments.usage:
            store.usage = load_profile(arguments.usage, model, config.num_layers, config.num_experts)
        if arguments.save_usage:
            start = store.usage if arguments.usage else None
            counter = UsageCounter(model, config.num_layers, config.num_experts, start)
    for name, value in (("policy", arguments.policy), ("prefetch", arguments.prefetch)):
        if value in ("pinned", "frequency", "transition") and store.usage is None:
            raise DynarouteError(f"--{name} {value}: needs --usage FILE, which --save-usage writes")
    load = store.usage.load if store.usage else [[0.0] * config.num_experts] * config.num_layers
    policy = make_policy(arguments.policy or "lru", load)
    lookahead = arguments.lookahead or config.top_k
    prefetcher = make_prefetcher(arguments.prefetch or "none", store, served.routers, lookahead)
    aware = arguments.cache_aware or 0.0
    cache = ExpertCache(store, capacity, policy, arguments.per_layer, prefetcher, arguments.device, counter, aware)
    served.bind(cache)
    return cache


def prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """The prompts, one by one. Raises DynarouteError if their file cannot be read or has none."""
    if arguments.prompt is not None:
        yield arguments.prompt
    elif arguments.prompts:
        try:
            lines = Path(arguments.prompts).read_text("utf-8", errors="replace").split("\n")
        except OSError as error:
            raise DynarouteError(f"--prompts {arguments.prompts}: cannot be read: {error.strerror}") from error
        if not any(line.strip() for line in lines):
            raise DynarouteError(f"--prompts {arguments.prompts}: has no line with text")
        yield from (line for line in lines if line.strip())
    else:
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                line = ""
            if not line:
                return
            if line.strip():
                yield line.rstrip("\n")


class Output:
    """What was generated so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.started = time.perf_counter()
        self.first_seconds = 0.0  # until the first token came


def stream(text: Text, tokens: Iterator[int], output: Output) -> None:
    """Prints text as its tokens come, up to one that ends it."""
    printed = 0
    for token in tokens:
        output.first_seconds = output.first_seconds or time.perf_counter() - output.started
        if token in text.stop:
            break
        output.ids.append(token)
        decoded = text.decode(output.ids)
        if not decoded.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
            print(decoded[printed:], end="", flush=True)
            printed = len(decoded)
    print(text.decode(output.ids)[printed:], flush=True)


def summary(output: Output, statistics: CacheStatistics | None, file_bytes: int) -> str:
    """Times and cache statistics in one line."""
    tokens, seconds = len(output.ids), time.perf_counter() - output.started
    line = (
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s), the first after "
        f"{output.first_seconds:.2f} s"
    )
    if statistics is None:
        return f"{line}; all experts resident"
    ahead = f", of which {statistics.reads_ahead * file_bytes / 2**20:.1f} ahead" if statistics.predicted else ""
    late = f", {statistics.late} of the hits late" if statistics.predicted else ""
    return (
        f"{line}; hit rate {statistics.hit_rate:.3f} of {statistics.requests} requests{late}; "
        f"{statistics.reads * file_bytes / 2**20:.1f} MiB read{ahead}; "
        f"waited {statistics.wait_seconds:.3f} s for experts"
    )


def generate(arguments: argparse.Namespace) -> None:
    """Generates and prints.

    Raises:
        DynarouteError: the arguments or the model are not usable.
    """
    check(arguments)
    torch.set_num_threads(arguments.threads)
    path = arguments.store or arguments.model
    if arguments.store or ((Path(path) / MANIFEST).exists() and not (Path(path) / "config.json").exists()):
        served = serve_store(arguments, path)
    else:
        served = serve_checkpoint(arguments)
    store, text = served.store, served.text
    cache = make_cache(arguments, served)
    generator, interrupted = torch.Generator().manual_seed(arguments.seed), False

    def answer(prompt: str) -> bool:
        """Prints a text and its summary; whether it was interrupted."""
        ids = text.encode(valid_unicode(prompt), arguments.chat)
        if not 0 < len(ids) < served.positions:
            raise DynarouteError(f"--prompt: {len(ids)} tokens; the model has {served.positions} positions")
        output, interrupted = Output(), False
        choice = arguments.temperature, arguments.top_p, generator, text.allowed
        aware = cache is not None and cache.cache_aware > 0
        forward = Recording(served.start(), COMPARED if aware else 0)
        tokens = sample(forward, served.positions, ids, *choice)
        try:
            stream(text, itertools.islice(tokens, min(arguments.tokens, served.positions)), output)
        except KeyboardInterrupt:
            print(flush=True)  # ends the unfinished line
            interrupted = True
        if interrupted and cache is not None:
            cache.clear()
        statistics = None if cache is None else cache.take_statistics()
        line = summary(output, statistics, store.file_bytes)
        if aware:
            line += f"; inexact: held experts preferred by {cache.cache_aware:g}"
            calls = forward.calls[: len(output.ids)]
            if calls and not interrupted:
                with cache.exact_routing():
                    line += f"; {compare_routing(calls, output.ids[: len(calls)], served.start())}"
                cache.take_statistics()
        print(line, file=sys.stderr)
        return interrupted

    try:
        with nullcontext() if cache is None else cache:
            for prompt in prompts(arguments):
                interrupted = False
                try:
                    interrupted = answer(prompt)
                except DynarouteError as error:
                    if not arguments.interactive:
                        raise
                    print(f"generate: {error}", file=sys.stderr)
                if interrupted and not arguments.interactive:
                    break
    finally:
        if cache is not None and cache.counter:
            cache.counter.save(arguments.save_usage)
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
