"""Decoding with experts of the published size on disk: ours against residency, transformers' Mixtral and accelerate.

    PYTHONPATH=src python benchmarks/benchmark_cached_inference.py
                                             (or: dvc repro benchmarks/dvc.yaml:benchmark_cached_inference)

Writes  reports/benchmarks/cached_inference.json, shown in reports/cached_inference.md

96 experts of 8 MiB with random weights, a third of them held, batch 1, fp32 on the CPU; about 5 GiB of temporary files
in .scratch and 6 GiB of memory. One thread computes; our reading threads run beside it, on a second core where there is
one. All candidates decode the same number of tokens after one token, and take turns. Warm, resident models included:
just after the same decoding, which is not timed. Cold: before every token, outside of what is timed, the system forgets
all pages of the candidate's files that are not in use.

Peers: transformers' Mixtral of equal expert bytes, resident and with its experts mapped to disk by a device map; and
our own module under accelerate's `disk_offload`, which loads all experts of a layer where a module holds them.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from timing import ratios, show, turns
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
THREADS = 1  # that compute: the other core of a small machine reads
NEW_TOKENS, REPEATS = 24, 5
SETTINGS = [("lru", "none"), ("next_use", "none"), ("lru", "gate"), ("next_use", "gate")]
# What goals are judged by, whatever the others turn out to be: what the simulation of the default run recommends for
# experts of this size at a third of them, on disk as in the page cache.
GOAL_SETTING = ("next_use", "gate")
RESIDENT = ("ours, all resident", "warm")
SCRATCH = Path(".scratch/benchmark_cached_inference")


class Run(NamedTuple):
    """One candidate's decoding."""

    seconds: float
    hit_rate: float | None = None  # of ours
    late_rate: float | None = None  # of ours: the share of requests that were hits, but not there yet


Candidate = tuple[tuple[str, str], Callable[[], Run]]  # its name and page cache, warm or cold; and its decoding


def main(settings: Settings) -> None:
    """Makes the models, lets them take turns, prints a table and writes the report."""
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
    mixtral, disk = make_mixtral(), SCRATCH / "mixtral"
    trace = record_mixtral(mixtral)
    candidates = dict(
        [
            *ours(store, capacity),
            (("Mixtral, all resident", "warm"), lambda: again(lambda: decode(mixtral_passes(mixtral)))),
            *with_cold("Mixtral, experts on disk", load_mixtral_from_disk(disk), mixtral_passes, SCRATCH),
            *with_cold("ours under accelerate's disk_offload", offloaded(store), our_passes, SCRATCH / "offload"),
        ]
    )
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


def ours(store: ExpertStore, capacity: int) -> Iterator[Candidate]:
    """The resident model first, then cached ones, whose logits must be the resident model's."""
    resident, cached = load_resident(store), load_backbone(store)
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    expected: list[Tensor] = []

    def run_resident() -> Run:
        result, logits = run_passes(greedy_decode(resident, prompt, NEW_TOKENS))
        expected[:] = [logits]
        return Run(result.decode_seconds[0])

    def run_cached(size: int, policy: str, prefetch: str, cold: bool) -> Run:
        prefetcher = make_prefetcher(prefetch, store, routers(cached), CONFIG.top_k)
        with ExpertCache(store, size, make_policy(policy, store.usage.load), prefetcher=prefetcher) as cache:
            bind_experts(cached, cache)
            forget = forgetter(store.path) if cold else None
            result, logits = run_passes(greedy_decode(cached, prompt, NEW_TOKENS), cache, forget)
        if not torch.equal(logits, expected[0]):
            raise DynarouteError(f"{size} experts, {policy}, {prefetch}: logits are not those of the resident model")
        found = result.decode
        return Run(result.decode_seconds[0], found.hit_rate, found.late / found.requests)

    yield RESIDENT, functools.partial(again, run_resident)
    cells = [(capacity, policy, prefetch, cold) for cold in (False, True) for policy, prefetch in SETTINGS]
    cells += [(size, "next_use", "none", False) for size in (capacity // 2, 2 * capacity)]
    for cell in sorted(cells, key=lambda cell: cell[3]):
        size, policy, prefetch, cold = cell
        name, run_cell = cached_name(size, policy, prefetch), functools.partial(run_cached, *cell)
        yield ((name, "cold"), run_cell) if cold else ((name, "warm"), functools.partial(again, run_cell))


def cached_name(size: int, policy: str, prefetch: str) -> str:
    """What our model with a cache is called."""
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


def load_mixtral_from_disk(folder: Path) -> nn.Module:
    """The saved Mixtral with experts that stay on disk."""
    from transformers import MixtralForCausalLM

    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer in range(CONFIG.num_layers):
        prefix = f"model.layers.{layer}"
        parts = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")
        places |= {f"{prefix}.{part}": "cpu" for part in parts}
        places[f"{prefix}.mlp.experts"] = "disk"
    model = MixtralForCausalLM.from_pretrained(folder, device_map=places, offload_folder=SCRATCH / "mixtral_offload")
    model.set_experts_implementation("eager")
    return model.eval()


def offloaded(store: ExpertStore) -> nn.Module:
    """Our resident module under accelerate's `disk_offload`."""
    from accelerate import disk_offload

    model = load_resident(store)
    # Its experts are no modules that are called: accelerate then wants the class whose call needs them all.
    return disk_offload(model, SCRATCH / "offload", torch.device("cpu"), preload_module_classes=["MoE"])


@torch.inference_mode()
def mixtral_passes(model: nn.Module) -> Iterator[Tensor]:
    """Greedy decoding like `dynaroute.dwr.inference.greedy_decode`: yields the logits of each pass, [1, 1, V]."""
    token, keys = torch.zeros(1, 1, dtype=torch.int64), None
    for _ in range(NEW_TOKENS + 1):
        output = model(token, past_key_values=keys, use_cache=True)
        token, keys = output.logits[:, -1:].argmax(-1), output.past_key_values
        yield output.logits


def our_passes(model: nn.Module) -> Iterator[Tensor]:
    """Greedy decoding of our module without a cache of ours."""
    return greedy_decode(model, torch.zeros(1, 1, dtype=torch.int64), NEW_TOKENS)


def decode(passes: Iterator[Tensor], before_pass: Callable[[], None] | None = None) -> Run:
    """Times a peer's decoding."""
    return Run(run_passes(passes, None, before_pass)[0].decode_seconds[0])


def with_cold(
    name: str, model: nn.Module, passes: Callable[[nn.Module], Iterator[Tensor]], folder: Path
) -> Iterator[Candidate]:
    """A peer with a warm and with a cold page cache."""
    forget = forgetter(folder)
    yield (name, "warm"), lambda: again(lambda: decode(passes(model)))
    yield (name, "cold"), lambda: decode(passes(model), forget)


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
    """What LRU would hit on a trace, the first token left out."""
    residency = Residency(capacity, LRU(), CONFIG.num_layers, CONFIG.top_k)
    for number, (layer, needed) in enumerate(calls):
        residency.call(layer, needed)
        if number + 1 == CONFIG.num_layers:
            residency.statistics = CacheStatistics()
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
            started = time.perf_counter()
            use(key)
            times.append(1e3 * (time.perf_counter() - started))
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
    """Speed, and the ratio to the resident model's of the same round; which hits are late depends on the round."""
    found = to_ours(resident, runs)
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


def to_ours(theirs: list[Run], ours: list[Run]) -> list[float]:
    """A peer's seconds over ours, of every round."""
    return ratios(*([run.seconds for run in runs] for runs in (theirs, ours)))


def compare(runs: dict[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """The goals: our setting at a third of the experts, by page cache, against residency and peers.

    A value is the median over rounds of the peer's seconds over ours of the same round, beside its range; and so is
    what all experts resident reach, which is more than a cache can be expected to.
    """
    own = cached_name(nearest_a_third(CONFIG.num_layers * CONFIG.num_experts), *GOAL_SETTING)
    goals = []
    for state, to_resident, to_mixtral, to_accelerate in (("warm", 0.95, 1.5, 15.0), ("cold", 0.35, 6.0, 15.0)):
        for against, goal in (
            (RESIDENT[0], to_resident),
            ("Mixtral, experts on disk", to_mixtral),
            ("ours under accelerate's disk_offload", to_accelerate),
        ):
            peer = runs[RESIDENT if against == RESIDENT[0] else (against, state)]  # nothing of it is read
            values, bounds = (to_ours(peer, runs[name]) for name in ((own, state), RESIDENT))
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
