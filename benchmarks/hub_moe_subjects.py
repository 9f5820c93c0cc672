"""One subject of benchmark_hub_moe decodes a text, in a process of its own: prints what it took as JSON.

    python benchmarks/hub_moe_subjects.py '{"subject": "ours", ...}'

It joins the memory group before anything is loaded, so that the limit counts all that it needs, files included.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Logits = Any  # of one token, [V], a tensor or an array


class Subject(NamedTuple):
    """A loaded model."""

    step: Callable[[int], Logits]  # reads the next token of the text
    forget: Callable[[], None] = lambda: None  # drops what it keeps of the experts
    hit_rate: Callable[[], float | None] = lambda: None  # since it was last asked


def ours(plan: dict[str, Any]) -> Subject:
    """Our runtime with as many experts as fit in `experts_bytes`; with all of them in memory if that is None."""
    from dynaroute.dwr.experts.cache import ExpertCache
    from dynaroute.dwr.experts.policies import make_policy
    from dynaroute.dwr.hub import HubModel, expert_blocks

    model = HubModel(Path(plan["folder"]))
    store, step = model.store, model.start_text()
    if plan["experts_bytes"] is None:
        for layer, block in enumerate(expert_blocks(model.model).values()):
            weights = [store.load(layer, expert, store.new_weights()) for expert in range(store.config.num_experts)]
            block.experts.source = Resident(weights)
        return Subject(lambda token: step([token]))
    policy = make_policy("lru", [[0.0] * store.config.num_experts] * store.config.num_layers)
    cache = ExpertCache(store, min(plan["experts_bytes"] // store.expert_bytes, store.num_experts), policy)
    model.bind(cache)
    return Subject(lambda token: step([token]), cache.clear, lambda: cache.take_statistics().hit_rate)


class Resident:
    """A layer's experts in memory, as an `ExpertSource`."""

    def __init__(self, weights: list[Any]) -> None:
        self._weights = weights

    def observe(self, state: Any, scores: Any) -> None:
        """Nothing is prefetched."""

    def preference(self) -> None:
        """Routing is exact."""

    def fetch(self, needed: list[int]) -> Iterator[tuple[int, Any]]:
        """The weights of each expert."""
        return ((expert, self._weights[expert]) for expert in needed)


def transformers_disk(plan: dict[str, Any]) -> Subject:
    """transformers with experts mapped to disk by a device map, in bf16; it writes them anew when it loads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    for layer in range(AutoConfig.from_pretrained(plan["folder"]).num_hidden_layers):
        parts = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")
        places |= {f"model.layers.{layer}.{part}": "cpu" for part in parts}
        places[f"model.layers.{layer}.mlp.experts"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        plan["folder"], dtype=torch.bfloat16, device_map=places, offload_folder=plan["work"]
    )
    return _of_transformers(model)


def disk_offload(plan: dict[str, Any]) -> Subject:
    """transformers' model, in bf16, with all weights under accelerate's `disk_offload`, which has them in `work`."""
    import accelerate
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(plan["folder"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # no file has its buffers
    return _of_transformers(accelerate.disk_offload(model, plan["work"], torch.device("cpu")))


def _of_transformers(model: Any) -> Subject:
    import torch
    from transformers import DynamicCache

    model.eval()
    past = DynamicCache(config=model.config)
    return Subject(lambda token: model(torch.tensor([[token]]), past_key_values=past, use_cache=True).logits[0, -1])


def llama_cpp(plan: dict[str, Any]) -> Subject:
    """llama.cpp, its weights mapped."""
    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.load_mode = llama.LLAMA_LOAD_MODE_MMAP
    parameters.use_extra_bufts = plan["limited"] is False  # weights that are laid out anew are not mapped
    model = llama.llama_model_load_from_file(plan["folder"].encode(), parameters)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, plan["threads"], plan["threads"]
    context = llama.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError(f"llama.cpp does not load {plan['folder']}")
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def step(token: int) -> Logits:
        if llama.llama_decode(context, llama.llama_batch_get_one((llama.llama_token * 1)(token), 1)):
            raise RuntimeError("llama.cpp does not decode")
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size,))

    return Subject(step)


SUBJECTS = {subject.__name__: subject for subject in (ours, transformers_disk, disk_offload, llama_cpp)}


def decode(plan: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """Times the tokens after the first one: cold, then, after some that are not timed, warm.

    Cold: before the first of them, all that can be read again is dropped from memory. A part ends early when it takes
    longer than `seconds`.
    """
    text, logits = iter(plan["text"]), []

    def read(most: int) -> list[float]:
        times: list[float] = []
        while len(times) < most and sum(times) < plan["seconds"]:
            started = time.perf_counter()
            output = subject.step(next(text))
            times.append(time.perf_counter() - started)
            if len(logits) < 2:  # which all subjects compute from the same tokens
                logits.append([float(value) for value in output[:64]])
        return times

    read(1)
    subject.forget()
    _forget(plan)
    cold = read(plan["cold"])
    read(plan["warm_up"])
    subject.hit_rate()
    before = _count("io", "read_bytes")
    warm = read(plan["warm"])
    return {
        "cold": cold,
        "warm": warm,
        "hit_rate": subject.hit_rate(),
        "read_bytes": (_count("io", "read_bytes") - before) / len(warm),  # of a token
        "logits": logits[1],
        "peak_bytes": 1024 * _count("status", "VmHWM"),  # getrusage has the parent's, if that was larger
    }


def _forget(plan: dict[str, Any]) -> None:
    from hub_moe_weights import forget

    for folder in plan["files"]:
        forget(Path(folder))
    if plan["group"]:
        (Path(plan["group"]) / "memory.force_empty").write_text("0")  # mapped pages, too


def _count(file: str, name: str) -> int:
    """A count of this process, as Linux keeps it; `read_bytes` of `io` are those that came from disks."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """The command."""
    plan = json.loads(sys.argv[1])
    if plan["group"]:
        (Path(plan["group"]) / "cgroup.procs").write_text("0")
    import torch

    torch.set_num_threads(plan["threads"])
    with torch.inference_mode():
        print(json.dumps(decode(plan, SUBJECTS[plan["subject"]](plan))))


if __name__ == "__main__":
    main()
