"""Decoding with OLMoE-1B-7B's shape in less memory than it needs: ours against transformers, accelerate and llama.cpp.

    PYTHONPATH=src python benchmarks/benchmark_hub_moe.py .scratch
                                             (or: dvc repro benchmarks/dvc.yaml:benchmark_hub_moe)

Writes  reports/benchmarks/hub_moe.json, shown in reports/cached_inference.md
        reports/benchmarks/hub_moe.png   memory against tokens/s

16 layers of 64 experts with random weights in bf16, 8 experts a token, batch 1. Every subject reads the same tokens, in
a process of its own, in a memory group (cgroup v1) with a limit that counts its files' pages: a third of the experts,
the rest of the model as ours holds it, and 0.5 GiB for libraries. Subjects take turns. Cold: nothing of the model's
files is in memory, as far as it can be read again. Warm: after 24 more tokens. llama.cpp is left out where
llama-cpp-python is not installed; where no memory group can be made, nothing is limited, and the report says so.

It takes about 35 minutes on two cores, 16 GiB of memory, and 45 GB of disk in the folder hub_moe of the one that is its
argument. That is deleted at the end, except for the weights if it has a file named `keep`. An interrupted run resumes
after the last finished subject.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import hub_moe_subjects
import torch
from hub_moe_weights import GGUF, forget, shapes, write_checkpoint, write_gguf, write_offload
from timing import ratios, show
from tqdm import tqdm
from transformers import OlmoeConfig

import dynaroute
from dynaroute.config import Settings
from dynaroute.dwr.experts.checkpoint import Checkpoint
from dynaroute.dwr.export_model import export_model
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_json
from dynaroute.pipeline.machine import describe_machine
from dynaroute.pipeline.stage import run
from dynaroute.reporting.dwr.figures import plot_peers

CONFIG = OlmoeConfig(
    vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, tie_word_embeddings=False,
)  # fmt: skip
SKEW = 1.0  # of the routing: with it, LRU hits about 0.65 of the requests at a third of the experts
TOKENS = {"cold": 4, "warm_up": 24, "warm": 16, "seconds": 20}  # of a subject; seconds that each part takes at most
CONSTANT = 512 * 2**20  # bytes for Python, libraries, keys and values
BYTES = {"bf16": 2, "int8": 1}  # of a weight; scales are left out
GROUPS = Path("/sys/fs/cgroup/memory")


class Row(NamedTuple):
    """A subject with a limit."""

    name: str
    subject: str  # in hub_moe_subjects
    copy: str  # of the weights
    precision: str  # of the experts
    limit: str | None = None  # a third of the experts in this precision; None: no limit
    threads: int = 1  # that compute


SHARDS = Row("ours, shards", "ours", "shards", "bf16", "bf16")
RESIDENT, RESIDENT_INT8 = (
    Row(f"ours, all resident in {kind}", "ours", copy, kind) for kind, copy in (("bf16", "shards"), ("int8", "int8"))
)
INT8 = Row("ours, int8 export", "ours", "int8", "int8", "bf16")
DISK = Row("transformers, experts on disk", "transformers_disk", "resaved", "bf16", "bf16")
OFFLOAD = Row("accelerate's disk_offload", "disk_offload", "offload", "bf16", "bf16")
LLAMA = Row("llama.cpp", "llama_cpp", "gguf", "int8", "bf16")
# Of what takes turns: rounds and rows. The slow ones come first, so that their copies need not be kept.
PHASES = [
    (2, [SHARDS, DISK, OFFLOAD]),
    (3, [
        SHARDS,
        Row("ours, bf16 export", "ours", "bf16", "bf16", "bf16"),
        INT8,
        LLAMA,
        LLAMA._replace(name="llama.cpp, 2 threads", threads=2),
        INT8._replace(limit="int8"),
        LLAMA._replace(limit="int8"),
        RESIDENT,
        RESIDENT_INT8,
        LLAMA._replace(limit=None),
    ]),
]  # fmt: skip
# Set before anything was measured: page cache, row, the row that it is compared with, and the ratio of their speeds.
GOALS = (
    ("warm", SHARDS, RESIDENT, 0.5), ("warm", INT8, RESIDENT_INT8, 0.5), ("warm", SHARDS, DISK, 10.0),
    ("warm", INT8, LLAMA, 1.0), ("cold", INT8, LLAMA, 1.0),
)  # fmt: skip


def main(settings: Settings, scratch: str) -> None:
    """Measures, prints tables and writes the report."""
    folder = Path(scratch) / "hub_moe"
    identity = repr((CONFIG.to_dict(), SKEW, TOKENS, CONSTANT, PHASES))
    if (folder / "identity").exists() and (folder / "identity").read_text() != identity:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity").write_text(identity)
    measured = measure(folder)
    report = summarize(measured, read_record(folder / "machine.json"))
    show(report["rows"], "name", "limit_bytes", "hit_rate", "read_bytes", "cold", "warm", "lowest", "highest", "share")
    show(report["goals"], "page_cache", "name", "against", "value", "lowest", "highest", "goal")
    write_json("reports/benchmarks/hub_moe.json", report)
    plot_peers(report["rows"], "reports/benchmarks/hub_moe.png")
    shutil.rmtree(folder / "results" if (folder / "keep").exists() else folder)


Found = list[dict[Row, list[dict[str, Any]]]]  # by phase: for each row, what each round found


def measure(folder: Path) -> Found:
    """All rounds; what was found before is not measured again."""
    parameters = expert_weights() + backbone_weights()
    needed, free = 3.2 * BYTES["bf16"] * parameters, shutil.disk_usage(folder).free
    if not (folder / "shards").exists() and needed > free:
        raise DynarouteError(f"{folder}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free")
    prepare(folder, "shards")
    if not (folder / "machine.json").exists():
        group = make_group(None)
        limited = group is not None
        if group:
            group.rmdir()
        write_json(folder / "machine.json", {"limited": limited, **bandwidths(folder / "shards")})
    found: Found = [{row: [] for row in rows} for _, rows in PHASES]
    for number, (rounds, rows) in enumerate(PHASES):
        for index, row in enumerate(tqdm(rows * rounds, desc="subjects", disable=None)):
            if not (path := folder / f"results/{number}-{index}.json").exists():
                write_json(path, decode(folder, row))
            found[number][row].append(read_record(path))
        for copy in {row.copy for row in rows} - {row.copy for _, later in PHASES[number + 1 :] for row in later}:
            if not (folder / "keep").exists():
                shutil.rmtree(folder / copy, ignore_errors=True)
    return found


def prepare(folder: Path, copy: str) -> None:
    """Writes a copy of the weights, unless it is there."""
    if (folder / copy).exists():
        return
    shards = folder / "shards"
    match copy:
        case "shards":
            write_checkpoint(shards, CONFIG, SKEW)
        case "bf16" | "int8":
            export_model(shards, folder / copy, copy)
        case "offload":
            write_offload(folder / copy, Checkpoint(shards), CONFIG)
        case "gguf":
            write_gguf(folder / copy, Checkpoint(shards), CONFIG)
        case "resaved":  # by transformers, when it loads
            (folder / copy).mkdir()
    forget(folder / copy)


def expert_weights() -> int:
    """The weights of all experts."""
    return 3 * CONFIG.hidden_size * CONFIG.intermediate_size * CONFIG.num_experts * CONFIG.num_hidden_layers


def backbone_weights() -> int:
    """All others."""
    tensors = (shape for shard in shapes(CONFIG).values() for name, shape in shard.items() if ".experts." not in name)
    return sum(torch.Size(shape).numel() for shape in tensors)


def backbone_bytes() -> int:
    """What the others take in ours: matrices in bf16, and the embeddings as 32-bit floats."""
    return BYTES["bf16"] * (backbone_weights() + CONFIG.vocab_size * CONFIG.hidden_size)


def limit_bytes(row: Row) -> int | None:
    """The memory limit: a third of the experts, the rest, and a constant."""
    if row.limit is None:
        return None
    return BYTES[row.limit] * expert_weights() // 3 + backbone_bytes() + CONSTANT


def make_group(limit: int | None) -> Path | None:
    """A memory group; None if there can be none."""
    group = GROUPS / f"dynaroute-hub-moe-{os.getpid()}"
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(limit or -1))
    except OSError:
        return None
    return group


def decode(folder: Path, row: Row) -> dict[str, Any]:
    """A subject's times in a process of its own; `note` says why there are none.

    Raises:
        DynarouteError: one of ours failed.
    """
    if row.subject == "llama_cpp" and not importlib.util.find_spec("llama_cpp"):
        return {"note": "not installed"}
    prepare(folder, row.copy)
    limit, group = limit_bytes(row), make_group(limit_bytes(row))
    weights = folder / row.copy / GGUF if row.subject == "llama_cpp" else folder / row.copy
    count = 1 + sum(TOKENS[part] for part in ("cold", "warm_up", "warm"))
    plan = {
        "subject": row.subject,
        "folder": str(folder / "shards" if row.copy in ("resaved", "offload") else weights),
        "files": [str(folder / name) for name in {"shards", row.copy}],
        "work": str(folder / row.copy),
        "experts_bytes": limit and limit - CONSTANT - backbone_bytes(),
        "limited": limit is not None,
        "group": str(group) if group else None,
        "threads": row.threads,
        "text": torch.randint(CONFIG.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist(),
        **TOKENS,
    }
    own = [str(Path(dynaroute.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(own), "OMP_NUM_THREADS": str(row.threads)}
    command = [sys.executable, hub_moe_subjects.__file__, json.dumps(plan)]
    for name in plan["files"]:
        forget(Path(name))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        if group:
            group.rmdir()
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = "killed: out of memory" if done.returncode == -9 else done.stderr.strip().rpartition("\n")[2][:200]
    if row.subject == "ours":
        raise DynarouteError(f"{row.name}: {reason}")
    return {"note": reason}


def bandwidths(shards: Path) -> dict[str, float]:
    """Bytes a second that one thread reads from memory, and from the disk in pieces of 1 MiB: the best of three."""
    memory, vector = torch.ones(2**17, 2**11), torch.ones(2**11)  # 1 GiB, more than caches hold
    torch.set_num_threads(1)
    path = max(shards.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def read_file() -> int:
        forget(shards)
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(2**20)
            while file.readinto(buffer):
                pass
        return path.stat().st_size

    def speed(work: Callable[[], int]) -> float:
        started = time.perf_counter()
        return work() / (time.perf_counter() - started)

    def read_memory() -> int:
        memory @ vector
        return 4 * memory.numel()

    return {name: max(speed(work) for _ in range(3)) for name, work in (("memory", read_memory), ("disk", read_file))}


def summarize(found: Found, machine: dict[str, Any]) -> dict[str, Any]:
    """The report. Speeds are medians over rounds, with their range."""
    together: dict[Row, list[dict[str, Any]]] = {}
    for phase in found:
        for row, rounds in phase.items():
            together.setdefault(row, []).extend(rounds)
    rows, goals = [row_of(row, rounds, machine, together) for row, rounds in together.items()], []
    for state, own, other, goal in GOALS:
        phase = next(phase for phase in found if own in phase and other in phase)
        if all("note" not in one for one in phase[other]):
            values = ratios(*([speed(one[state]) for one in phase[row]] for row in (own, other)))
            goals.append(
                {"page_cache": state, "name": own.name, "against": other.name, "value": median(values), "goal": goal}
                | {"lowest": min(values), "highest": max(values)}
            )
    return {
        "experts": CONFIG.num_experts * CONFIG.num_hidden_layers,
        "experts_per_token": CONFIG.num_experts_per_tok * CONFIG.num_hidden_layers,
        "model_bytes": BYTES["bf16"] * (expert_weights() + backbone_weights()),
        "skew": SKEW,
        "tokens": TOKENS,
        "limited": machine["limited"],
        "memory_bandwidth": machine["memory"],
        "disk_bandwidth": machine["disk"],
        "rows": rows,
        "goals": goals,
        "machine": describe_machine("cpu"),
    }


def speed(seconds: list[float]) -> float:
    """Tokens a second."""
    return len(seconds) / sum(seconds)


def row_of(
    row: Row, rounds: list[dict[str, Any]], machine: dict[str, Any], others: dict[Row, list[dict[str, Any]]]
) -> dict[str, Any]:
    """A row of the report.

    The bound is the time in which a token's weights pass memory once, and what was read for it the disk, both at once.
    `difference` is the largest of a logit, relative to the largest logit, to ours with all experts in bf16.
    """
    limit = limit_bytes(row)
    entry = {"name": row.name, "precision": row.precision, "threads": row.threads, "limit_bytes": limit}
    if notes := [one["note"] for one in rounds if "note" in one]:
        return {**entry, "note": notes[0]}
    speeds = [speed(one["warm"]) for one in rounds]
    share = CONFIG.num_experts_per_tok / CONFIG.num_experts
    embeddings = CONFIG.vocab_size * CONFIG.hidden_size  # a token reads one row
    width = 1 if row.subject == "llama_cpp" else 2  # bytes of the other weights
    weights = share * expert_weights() * BYTES[row.precision] + (backbone_weights() - embeddings) * width
    read = median(one["read_bytes"] for one in rounds)
    times = {"memory": weights / row.threads / machine["memory"], "disk": read / machine["disk"]}
    resident = row.subject == "ours" and limit is None  # reads nothing, cold or warm
    bound_by = max(times, key=times.__getitem__)
    expected = others[RESIDENT][0]["logits"]
    return {
        **entry,
        "memory_bytes": limit or max(one["peak_bytes"] for one in rounds),
        "hit_rate": rounds[0]["hit_rate"],
        "read_bytes": read,
        "cold": None if resident else median(speed(one["cold"]) for one in rounds),
        "warm": median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "ratio": median(speeds) / median(speed(one["warm"]) for one in others[SHARDS]),
        "bound_by": bound_by,
        "share": median(speeds) * times[bound_by],
        "difference": max(abs(a - b) for a, b in zip(rounds[0]["logits"], expected, strict=True))
        / max(map(abs, expected)),
    }


if __name__ == "__main__":
    run(main, __doc__, "scratch")
