"""Traces from elsewhere: what a line may be, and that a replay has the hits of the pipeline's own."""

import csv
import random

import pytest

from dynaroute.analysis.foreign import hit_rates, main, read_calls
from dynaroute.dwr.experts.policies import LRU
from dynaroute.dwr.experts.residency import Residency


def test_a_trace_is_replayed_call_by_call(tmp_path, capsys):
    draw = random.Random(0)
    calls = [(layer, draw.sample(range(6), 2)) for _ in range(50) for layer in range(3)]
    separators = [",", " ", "\t", ", "]
    lines = [separators[i % 4].join(map(str, (i // 3, layer, *needed))) for i, (layer, needed) in enumerate(calls)]
    (tmp_path / "trace").write_text("\n\n".join(lines))
    assert read_calls(tmp_path / "trace") == calls
    main([str(tmp_path / "trace"), "--capacities", "2", "7"])
    rows = {(int(row["capacity"]), row["policy"]): row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    residency = Residency(7, LRU(), 3, 2)
    for layer, needed in calls:
        residency.call(layer, sorted(needed))
    assert float(rows[7, "lru"]["hit_rate"]) == pytest.approx(residency.statistics.hit_rate, abs=1e-6)
    assert max(float(rows[7, name]["gap_closed"]) for name in ("lru", "lru_per_layer")) == 0
    assert float(rows[7, "min"]["gap_closed"]) == 1
    assert (2, "lru_per_layer") not in rows  # one expert for each layer has no room
    assert max(rate for _, rate in hit_rates(calls, 7)) == dict(hit_rates(calls, 7))["min"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1 2\n0 1", "trace:2: '0 1': must be a row, a layer and experts"),
        ("0,1,-2", "trace:1: '0,1,-2': must be a row"),
        ("0,1,2,2", "trace:1: names an expert twice"),
        ("", "trace: has no calls"),
        (None, "trace: cannot be read"),
    ],
)
def test_a_line_that_is_no_call_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "trace").write_text(text)
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / "trace"), "--capacities", "2"])
