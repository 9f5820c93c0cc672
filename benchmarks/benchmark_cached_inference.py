"""Decoding with experts of the published size on disk: ours against residency, transformers' Mixtral and accelerate.

    PYTHONPATH=src python benchmarks/benchmark_cached_inference.py
                                             (or: dvc repro benchmarks/dvc.yaml:benchmark_cached_inference)

Writes  reports/benchmarks/cached_inference.json, shown in reports/cached_inference.md

96 experts of 8 MiB with random weights, a third of them held, batch 1, fp32 on the CPU. It needs about 5 GiB of
temporary files in .scratch and 6 GiB of memory. One thread computes; our reading threads run beside it, on a second
core where there is one. All candidates decode the same number of tokens after one token, and take turns. Warm: right
after the same decoding, which is not timed. Cold: before every token, untimed, the system drops all pages of the
candidate's files that are not in use.

Peers: transformers' Mixtral of equal expert bytes, resident and with its experts mapped to disk by a device map; and
our own module under accelerate's `disk_offload`, which loads all experts of a layer where a module holds them.
"""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from timing import ratios, seconds, show, turns
from torch import Tensor, nn

from dynaroute.analysis.cache_benchmark import forgetter, run_passes
from dynaroute.config import Settings
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.policies import LRU, make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics, Residency, nearest_a_third
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store
from dynaroute.dwr.inference import bind_experts, greedy_decode, load_backbone, load_resident, routers
from dynaroute.dwr.model import DWRConfig, DWRTransformer, ExpertWeights, expert_ffn
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.machine import describe_machine
from dynaroute.pipeline.stage import run

CONFIG = DWRConfig(
    d_model=512, d_ff=2048, num_layers=6, num_heads=8, num_experts=16, top_k=2, max_seq_len=512, dropout=0.0,
    capacity_factor=None, vocab_size=50304,
)  # fmt: skip
GATED_WIDTH = 1366  # of Mixtral's experts, whose three matrices then hold as much as our two
THREADS = 1  # that compute; the other core of a small machine reads
NEW_TOKENS, REPEATS = 24, 5
SETTINGS = [("lru", "none"), ("next_use", "none"), ("lru", "gate"), ("next_use", "gate")]
# The setting that the goals judge, chosen beforehand: what the default run's simulation recommends for experts of this
# size at a third of them, on disk as in the page cache.
GOAL_SETTING = ("next_use", "gate")
RESIDENT = ("ours, all resident", "warm")
MIXTRAL, OFFLOADED = "Mixtral, experts on disk", "ours under accelerate's disk_offload"
GOALS = (
    ("warm", RESIDENT[0], 0.95), ("warm", MIXTRAL, 1.5), ("warm", OFFLOADED, 15.0),
    ("cold", RESIDENT[0], 0.35), ("cold", MIXTRAL, 6.0), ("cold", OFFLOADED, 15.0),
)  # fmt: skip
SCRATCH = Path(".scratch/benchmark_cached_inference")
PROMPT = torch.zeros(1, 1, dtype=torch.int64)


class Run(NamedTuple):
    """One candidate's decoding."""

    seconds: float
    hit_rate: float | None = None  # of ours
    late_rate: float | None = None  # of ours: the share of requests whose expert was still being read


Candidates = dict[tuple[str, str], Callable[[], Run]]  # decodings by name and page cache, warm or cold


def main(settings: Settings) -> None:
    """Measures, prints tables and writes the report."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(settings.seed)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    try:
        write_json("reports/benchmarks/cached_inference.json", measure())
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


def measure() -> dict[str, Any]:
    """The content of the report."""
    layers, experts = CONFIG.num_layers, CONFIG.num_experts
    usage = Usage(load=[[1 / experts] * experts] * layers, transitions=[[[1] * experts] * experts] * (layers - 1))
    export_store(DWRTransformer(CONFIG), "random", usage, SCRATCH / "store")
    store = ExpertStore(SCRATCH / "store")
    store.verify()  # now, since the first reading of a file checks it
    capacity = nearest_a_third(store.num_experts)
    mixtral, mixtral_on_disk = make_mixtral(), load_mixtral_from_disk()
    trace = record_mixtral(mixtral)
    model = offloaded(store)
    candidates = {
        **ours(store, capacity),
        ("Mixtral, all resident", "warm"): lambda: again(lambda: decode(mixtral_passes(mixtral))),
        **warm_and_cold(MIXTRAL, lambda: mixtral_passes(mixtral_on_disk), SCRATCH),
        **warm_and_cold(OFFLOADED, lambda: greedy_decode(model, PROMPT, NEW_TOKENS), SCRATCH / "offload"),
    }
    runs = turns(candidates, REPEATS, 1, "benchmark")  # in the first round everything is slow
    rows = [row(*name, found, runs[RESIDENT]) for name, found in runs.items()]
    show(rows, "name", "page_cache", "tokens_per_second", "ratio_to_resident", "ratio_lowest", "ratio_highest")
    goals = compare(runs)
    show(goals, "page_cache", "candidate", "against", "value", "lowest", "highest", "goal")
    return {
        "experts": store.num_experts,
        "expert_bytes": store.expert_bytes,
        "capacity": capacity,
        "experts_per_token": CONFIG.num_layers * CONFIG.top_k,
        "new_tokens": NEW_TOKENS,
        "repeats": REPEATS,
        "threads": THREADS,
        "rows": rows,
        "goals": goals,
        "use_of_an_expert_ms": cost_of_a_miss(store),
        "mixtral_lru_hit_rate": lru_hit_rate(trace, capacity),
        "machine": describe_machine("cpu"),
    }


def ours(store: ExpertStore, capacity: int) -> Candidates:
    """The resident model, and cached ones, whose logits must equal the resident model's; it must run first."""
    resident, cached = load_resident(store), load_backbone(store)
    expected: list[Tensor] = []

    def run_resident() -> Run:
        result, logits = run_passes(greedy_decode(resident, PROMPT, NEW_TOKENS))
        expected[:] = [logits]
        return Run(result.decode_seconds[0])

    def run_cached(size: int, policy: str, prefetch: str, forget: Callable[[], None] | None = None) -> Run:
        prefetcher = make_prefetcher(prefetch, store, routers(cached), CONFIG.top_k)
        with ExpertCache(store, size, make_policy(policy, store.usage.load), prefetcher=prefetcher) as cache:
            bind_experts(cached, cache)
            result, logits = run_passes(greedy_decode(cached, PROMPT, NEW_TOKENS), cache, forget)
        if not torch.equal(logits, expected[0]):
            raise DynarouteError(f"{size} experts, {policy}, {prefetch}: logits are not those of the resident model")
        found = result.decode
        return Run(result.decode_seconds[0], found.hit_rate, found.late / found.requests)

    cells = [(capacity, *setting) for setting in SETTINGS]
    sizes = [(size, "next_use", "none") for size in (capacity // 2, 2 * capacity)]
    warm = {(cached_name(*cell), "warm"): functools.partial(run_cached, *cell) for cell in cells + sizes}
    cold = {(cached_name(*cell), "cold"): functools.partial(run_cached, *cell, forgetter(store.path)) for cell in cells}
    warm = {RESIDENT: run_resident} | warm
    return {name: functools.partial(again, run) for name, run in warm.items()} | cold


def cached_name(size: int, policy: str, prefetch: str) -> str:
    """The name of our model with a cache."""
    return f"ours, {size} experts, {policy}, {prefetch}"


def again(run: Callable[[], Run]) -> Run:
    """The second of two decodings, whose files the first has read."""
    run()
    return run()


def make_mixtral() -> nn.Module:
    """A resident Mixtral, also saved."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=CONFIG.d_model, intermediate_size=GATED_WIDTH, num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads, num_key_value_heads=CONFIG.num_heads, vocab_size=CONFIG.vocab_size,
        num_local_experts=CONFIG.num_experts, num_experts_per_tok=CONFIG.top_k, max_position_embeddings=512,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")  # which touches the chosen experts alone
    model.save_pretrained(SCRATCH / "mixtral")
    return model


def load_mixtral_from_disk() -> nn.Module:
    """The saved Mixtral with its experts on disk."""
    from transformers import MixtralForCausalLM

    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer in range(CONFIG.num_layers):
        prefix = f"model.layers.{layer}"
        parts = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")
        places |= {f"{prefix}.{part}": "cpu" for part in parts}
        places[f"{prefix}.mlp.experts"] = "disk"
    offload = SCRATCH / "mixtral_offload"
    model = MixtralForCausalLM.from_pretrained(SCRATCH / "mixtral", device_map=places, offload_folder=offload)
    model.set_experts_implementation("eager")
    return model.eval()


def offloaded(store: ExpertStore) -> nn.Module:
    """Our resident module under accelerate's `disk_offload`."""
    from accelerate import disk_offload

    model = load_resident(store)
    # Experts are not modules that are called, so accelerate needs the class whose call uses all of them.
    return disk_offload(model, SCRATCH / "offload", torch.device("cpu"), preload_module_classes=["MoE"])


@torch.inference_mode()
def mixtral_passes(model: nn.Module) -> Iterator[Tensor]:
    """Greedy decoding like `dynaroute.dwr.inference.greedy_decode`: yields the logits of each pass, [1, 1, V]."""
    token, keys = PROMPT, None
    for _ in range(NEW_TOKENS + 1):
        output = model(token, past_key_values=keys, use_cache=True)
        token, keys = output.logits[:, -1:].argmax(-1), output.past_key_values
        yield output.logits


def decode(passes: Iterator[Tensor], before_pass: Callable[[], None] | None = None) -> Run:
    """Times a peer's decoding."""
    return Run(run_passes(passes, None, before_pass)[0].decode_seconds[0])


def warm_and_cold(name: str, start: Callable[[], Iterator[Tensor]], folder: Path) -> Candidates:
    """A peer, whose decoding `start` begins, with a warm and with a cold page cache of the folder's files."""
    forget = forgetter(folder)
    return {(name, "warm"): lambda: again(lambda: decode(start())), (name, "cold"): lambda: decode(start(), forget)}


def record_mixtral(model: nn.Module) -> list[tuple[int, list[int]]]:
    """Which experts its own routing asks for: (layer, experts) in the order of calls."""
    calls: list[tuple[int, list[int]]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda _, __, output, index=index: calls.append((index, sorted(output[2].flatten().tolist())))
        )
        for index, layer in enumerate(model.model.layers)
    ]
    decode(mixtral_passes(model))
    for hook in hooks:
        hook.remove()
    return calls


def lru_hit_rate(calls: list[tuple[int, list[int]]], capacity: int) -> float:
    """The hit rate of LRU on a trace, without its first token."""
    residency = Residency(capacity, LRU(), CONFIG.num_layers, CONFIG.top_k)
    for number, (layer, needed) in enumerate(calls):
        if number == CONFIG.num_layers:
            residency.statistics = CacheStatistics()
        residency.call(layer, needed)
    return residency.statistics.hit_rate


def cost_of_a_miss(store: ExpertStore) -> dict[str, float]:
    """Median milliseconds to use one expert once."""
    x = torch.randn(1, CONFIG.d_model)
    keys = [(layer, expert) for layer in range(CONFIG.num_layers) for expert in range(CONFIG.num_experts)]
    held = {key: store.read(*key) for key in keys}

    def use_mapped(key: tuple[int, int]) -> None:
        expert_ffn(x, ExpertWeights(**store.views(store.map(*key))))

    def timed(use: Callable[[tuple[int, int]], Any], before: Callable[[], None] = lambda: None) -> float:
        times = []
        for key in keys:
            before()
            times.append(1e3 * seconds(lambda key=key: use(key), "cpu"))
        return median(times)

    for key in keys:
        store.map(*key)
    with torch.inference_mode():
        return {
            "held": timed(lambda key: expert_ffn(x, held[key])),
            "in the page cache": timed(use_mapped),
            "on disk": timed(use_mapped, forgetter(store.path)),
        }


def row(name: str, page_cache: str, runs: list[Run], resident: list[Run]) -> dict[str, Any]:
    """Speed, and the ratio to the resident model's in the same round; the late rate differs between rounds."""
    found = speed_ratios(resident, runs)
    return {
        "name": name,
        "page_cache": page_cache,
        "tokens_per_second": NEW_TOKENS / median(one.seconds for one in runs),
        "ratio_to_resident": median(found),
        "ratio_lowest": min(found),
        "ratio_highest": max(found),
        "hit_rate": runs[0].hit_rate,
        "late_rate": None if runs[0].late_rate is None else median(one.late_rate for one in runs),
    }


def speed_ratios(theirs: list[Run], ours: list[Run]) -> list[float]:
    """A peer's seconds over ours, in every round."""
    return ratios(*([run.seconds for run in runs] for runs in (theirs, ours)))


def compare(runs: dict[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """The goals: our setting at a third of the experts against residency and peers.

    A value is the median of the peer's seconds over ours in the same round, with its range. `resident_value` is the
    same for our resident model, whose speed bounds that of a cache.
    """
    own = cached_name(nearest_a_third(CONFIG.num_layers * CONFIG.num_experts), *GOAL_SETTING)
    goals = []
    for state, against, goal in GOALS:
        peer = runs[RESIDENT if against == RESIDENT[0] else (against, state)]  # a resident model reads no files
        values, bounds = (speed_ratios(peer, runs[name]) for name in ((own, state), RESIDENT))
        goals.append(
            {
                "candidate": own,
                "page_cache": state,
                "against": against,
                "value": median(values),
                "lowest": min(values),
                "highest": max(values),
                "resident_value": median(bounds),
                "goal": goal,
            }
        )
    return goals


if __name__ == "__main__":
    run(main, __doc__)
