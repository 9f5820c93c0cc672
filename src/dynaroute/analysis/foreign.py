"""Replays a trace of routing from anywhere through a cache of every size and policy, and prints a table as CSV.

    python -m dynaroute.analysis.foreign trace.txt --capacities 16 32 64

A line of the trace is a call: the number of its token or forward pass, the layer and the experts it used, all from 0,
with spaces or commas between them ("17,3,40,12" or "17 3 40 12"). Calls are replayed in the order of the lines. The
last column is the share that a policy closes of the gap between LRU and MIN, which knows the future. LRU has one budget
or an equal share for each layer, whichever hits more.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from dynaroute.config.dwr import PolicyName
from dynaroute.dwr.experts.policies import Belady, make_policy
from dynaroute.dwr.experts.residency import Residency
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.terminal import program

Calls = list[tuple[int, list[int]]]  # (layer, experts)


def read_calls(path: Path) -> Calls:
    """The calls of a trace.

    Raises:
        DynarouteError: it cannot be read, or naming the line that is not a call.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DynarouteError(f"{path}: cannot be read: {error}") from error
    calls: Calls = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = re.split(r"[\s,]+", line.strip())
        if len(fields) < 3 or not all(re.fullmatch(r"\d{1,6}", field) for field in fields[1:]):
            raise DynarouteError(
                f"{path}:{number}: {line!r:.80}: must be a row, a layer and experts, such as 17 3 40 12"
            )
        experts = [int(field) for field in fields[2:]]
        if len({*experts}) < len(experts):
            raise DynarouteError(f"{path}:{number}: names an expert twice")
        calls.append((int(fields[1]), experts))
    if not calls:
        raise DynarouteError(f"{path}: has no calls")
    return calls


def hit_rates(calls: Calls, capacity: int) -> list[tuple[str, float]]:
    """The hit rate of every policy that needs no profile; `lru_per_layer` first if there is room, `min` last."""
    layers = max(layer for layer, _ in calls) + 1
    experts = max(max(needed) for _, needed in calls) + 1
    top_k = max(len(needed) for _, needed in calls)
    names = [name for name in get_args(PolicyName) if name != "pinned"]
    frequency = [[0.0] * experts] * layers
    cells = [("lru_per_layer", "lru", True)] * (capacity >= layers) + [(name, name, False) for name in [*names, "min"]]
    rates = []
    for label, name, per_layer in cells:
        policy = Belady(calls) if name == "min" else make_policy(name, frequency)
        residency = Residency(capacity, policy, layers, top_k, per_layer)
        for layer, needed in calls:
            residency.call(layer, sorted(needed))
        rates.append((label, residency.statistics.hit_rate))
    return rates


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Ends with one line and status 1 when the user is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--capacities", type=int, nargs="+", required=True, help="experts held, of all layers together")
    with program("foreign"):
        given = parser.parse_args(arguments)
        calls = read_calls(given.trace)
        print("capacity,policy,hit_rate,gap_closed")
        for capacity in tqdm(given.capacities, unit="capacity", disable=None):
            rates = hit_rates(calls, capacity)
            least, most = max(rate for name, rate in rates if name.startswith("lru")), dict(rates)["min"]
            for name, rate in rates:
                closed = f"{(rate - least) / (most - least):.4f}" if most > least else ""
                print(f"{capacity},{name},{rate:.6f},{closed}", file=sys.stdout)


if __name__ == "__main__":
    main()
