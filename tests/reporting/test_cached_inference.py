"""The report on cached inference says what its inputs say, and judges by the rules that it states."""

import math
import re
from pathlib import Path

import pytest
from dwr_tree import RUN, edit_csv, edit_json, write_peers

from dynaroute.errors import DynarouteError
from dynaroute.reporting.cached_inference import gap_closed, page, read_results
from dynaroute.reporting.dwr.results import read_simulated_hits

EXPORT, SUMMARY, SIMULATION = (Path(f"reports/dwr/{name}.json") for name in ("export", "cache", "simulation"))
CELLS, MEASURED, HITS, SPEEDS = (
    Path(f"reports/dwr/{name}.csv") for name in ("cache", "cache_timing", "simulated_hits", "simulated_speed")
)
PEERS = Path("reports/benchmarks/cached_inference.json")


@pytest.fixture(autouse=True)
def peers(tree):
    write_peers(tree)


def report() -> str:
    return page(read_results())


def test_it_names_its_run_and_holds_no_placeholder():
    text = report()
    assert RUN in text
    assert not re.search(r"\bnan\b|None|\{|\}|<class|\bTrue\b|\bFalse\b", text)
    assert text == report()


def test_the_gap_closed_is_judged_against_a_third():
    assert (
        "`next_use` closes 40% of the gap between LRU (0.301) and MIN (0.603): the goal of a third is reached. "
        "Elsewhere it closes 40% at 2, 40% at 6, 40% at 4 with equal shares for the layers." in report()
    )
    edit_json(SIMULATION, lambda data: data["share_of_gap_closed"].__setitem__("next_use", 0.3332))
    assert "the goal of a third is not reached" in report()


def test_goals_are_judged_by_their_values():
    text = report()
    assert "warm page cache, lru, none, to all resident: 0.98 (0.49–1.95), goal 0.95: reached.\n" in text
    assert "| warm | offloaded | 13.77 (6.88–27.53) | 15 | 14.12 |" in text


def test_a_missed_goal_comes_with_what_was_measured_of_its_reason():
    text = report()
    assert "goal 15: **not reached**. All experts resident reach 14.12 themselves" in text
    # (1 - 0.3456) * 12 experts, 9.87 - 0.61 ms each; 1 / 41.25 s
    assert "goal 0.35: **not reached**. A token misses at least 7.9 of its 12 experts; hits that were not read" in text
    assert "takes 9.26 ms more than one that is held: at least 72.7 ms, where a token takes " in text
    assert "in place of 24.2 ms with all experts resident" in text
    edit_json(PEERS, lambda data: data["goals"][1].__setitem__("value", 15.5))
    assert "15.50 (6.88–27.53), goal 15: reached." in report()


@pytest.mark.parametrize(
    ("rate", "found", "cost"),
    [
        (0.0, "misses 7.9 of its 12 experts. One that", "held: 72.7 ms, where"),
        (0.25, "misses 7.9 of its 12 experts, and 3.0 of those that it hits are late, not read yet. One that",
         "held: 72.7 ms, and up to 27.8 ms more for late ones, where"),
    ],
)  # fmt: skip
def test_late_hits_are_told_from_those_that_were_there(rate, found, cost):
    edit_json(PEERS, lambda data: data["rows"][1].__setitem__("late_rate", rate))
    text = report()
    assert found in text
    assert cost in text
    assert f"| lru, none | cold | 23.4 | 1.000 (1.000–1.000) | 0.346 | {rate:.3f} |" in text


def test_settings_whose_rounds_overlap_are_not_told_apart():
    def add(lowest, highest):
        def change(data):
            row = {**data["rows"][1], "name": "lru, gate", "hit_rate": 0.789}
            data["rows"].append(row | {"ratio_lowest": lowest, "ratio_highest": highest})

        return change

    assert "told apart" not in report()  # a single one
    edit_json(PEERS, add(0.9, 1.1))
    said = "Of our 2 cached settings with a cold page cache, whose hit rates are 0.346 to 0.789, those told apart, with"
    assert f"{said} ranges that do not overlap: none, so nothing follows from the order" in report()
    edit_json(PEERS, lambda data: data["rows"].pop())
    edit_json(PEERS, add(1.1, 1.2))
    assert f"{said} ranges that do not overlap: lru, gate is faster than lru, none." in report()


def test_a_failed_check_is_said_first():
    edit_json(SUMMARY, lambda data: data["checks"].__setitem__("logits_are_equal_in_every_cell", False))
    assert "**Failed**: logits are equal in every cell." in report()


@pytest.mark.parametrize(
    "row",
    [
        "| 4 | 0.301 | 0.422 | 0.603 |",
        "| 4 | 0.333 | 0.200 | 0.320 | 0.580 |",
        "| 6 | 0.500 | 0.300 | 0.480 | 0.870 |",
        "| 2 | 40.1% |",
        "| `next_use` | 0.422 | 0.320 | 0.422 | 0.320 | 40.1% |",
        "| `lru` | 0.301 | 0.200 | 0.301 | 0.200 | – |",
        "| `lru` | gate | 0.308 | 76.5% | 65.4% | 17 | 8.79 KiB | 500 B | 400 B | 321 B | 100 B |",
        "| `lru` | none | 0.308 | – | – | 17 | 8.79 KiB | 500 B | 400 B | 321 B | 100 B |",
        "| int8 | 3.27 KiB | 4.01770 | +0.00660 |",
        "| lru, none | cold | 23.4 | 1.000 (1.000–1.000) | 0.346 | – |",
        "| policy | prefetching | hit rate, decode | accuracy at 2 | of the trace | evictions for prefetches | read |",
        "| on disk | 9.87 ms |",
        "| pcie | seed | `lru` | 0.012 | 0.112 |",
        "| 2 | 32.63 KiB | `next_use` | 0.211 | 0.812 (gate) | 0.512 (gate) |",
        "| 4 | 65.26 KiB | `next_use` | 0.422 | 0.612 (none) | 0.312 (none) |",
        "| 6 | 97.89 KiB | `next_use` | 0.633 | 1.012 (none) | 0.712 (none) |",
        "The smallest of these budgets with 0.9 of the resident speed: disk, seed: 6; pcie, seed: none.",
    ],
)
def test_tables_hold_the_numbers_of_the_files(row):
    assert row in report()


@pytest.mark.parametrize(
    ("path", "column"),
    [
        (MEASURED, "bytes_late"),
        (CELLS, "accuracy"),
        (SPEEDS, "accuracy"),
        (HITS, "hit_rate"),
        (HITS, "uniform_hit_rate"),
        (SPEEDS, "ratio_to_resident"),
    ],
)
def test_every_number_follows_its_file(path, column):
    before = report()
    edit_csv(path, lambda table: table.__setitem__(column, table[column] * 0.5))
    assert report() != before


def test_without_peers_it_says_how_to_measure_them():
    PEERS.unlink()
    text = report()
    assert f"Not measured: `make benchmarks` does it, and writes `{PEERS}`." in text
    assert "goal 0.95" not in text


@pytest.mark.parametrize("path", [SUMMARY, SIMULATION], ids=str)
def test_results_of_another_run_are_refused(path):
    edit_json(path, lambda data: data.__setitem__("run", "fedcba"))
    with pytest.raises(DynarouteError, match="belongs to run fedcba"):
        report()


@pytest.mark.parametrize("path", [EXPORT, SUMMARY, SIMULATION, CELLS, MEASURED, HITS, SPEEDS], ids=str)
@pytest.mark.parametrize("content", [None, b"["])
def test_a_missing_or_damaged_input_is_named(path, content):
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DynarouteError, match=re.escape(str(path))):
        report()


def test_the_gap_closed_may_be_negative_or_not_there():
    edit_csv(HITS, lambda hits: hits.__setitem__("hit_rate", [0.2, 0.1, 0.6, 0.5, 0.5, 0.5, *hits["hit_rate"][6:]]))
    closed = gap_closed(read_simulated_hits(), per_layer=False)["next_use"]
    assert closed[2] == pytest.approx(-0.25)
    assert math.isnan(closed[4])
    assert list(gap_closed(read_simulated_hits(), per_layer=True).index) == [4]
