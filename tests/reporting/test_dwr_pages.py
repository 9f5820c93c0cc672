"""The DWR pages say what the stages' files say: whatever number changes there, changes here."""

import json
import re
from importlib import import_module as stage
from pathlib import Path

import pandas as pd
import pytest
from dwr_tree import RUN, edit_csv, edit_json, edit_yaml, settings_with_runs
from report_checks import STRANGE, hashes, strange, table_rows, unmarked

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.reporting.dwr import cached_inference, measured, report, runs
from dynaroute.reporting.dwr.results import read_benchmark, read_cached, read_measurements

CURVE, ROUTER, HITS = (Path(f"reports/dwr/{name}.csv") for name in ("training", "router", "simulated_hits"))
RUN_JSON, TRAINING, EXPORT, CACHE, SIMULATION = (
    Path(f"data/dwr/{name}.json")
    for name in ("train/run", "train/summary", "export/summary", "cache/summary", "simulation/summary")
)
CELLS, SPEEDS = Path("data/dwr/cache/cells.csv"), Path("data/dwr/simulation/speed.csv")
TIMING, TIMED, TIMES = (
    Path(f"data/dwr/measured/{name}") for name in ("training.json", "cache/summary.json", "cache/cells.csv")
)
PEERS, MOE = (Path(f"reports/benchmarks/{name}.json") for name in ("cached_inference", "moe"))
RUN_RESULTS, SOURCE = Path("data/dwr/run_results"), Path("data/inputs/corpora.docs.source.json")
FIGURES = {"training_curves": CURVE, "routers": ROUTER, "hit_rates": HITS, "runs": RUN_RESULTS / "none.json"}
FROM = {
    "dwr": [RUN_JSON, TRAINING, CURVE, ROUTER, EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS,
            Path("reports/reference.yaml"), Path("data/tokens/docs/metadata.json"), SOURCE],
    "cached_inference": [EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS, PEERS],
    "dwr_runs": [RUN_RESULTS / "wide.json"],
    "measured": [TIMING, TIMED, TIMES, CACHE, MOE],
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("tree")


def page(name: str) -> str:
    match name:
        case "dwr":
            return report.page(report.read_results())
        case "cached_inference":
            return cached_inference.page(read_cached(), read_benchmark("cached_inference"))
        case "dwr_runs":
            return runs.page(runs.read_runs(settings_with_runs()))
    found = (
        read_measurements(RUN),
        read_cached().summary,
        read_benchmark("moe"),
        report.read_results().reference["timing"],
    )
    return measured.section(*found)


def set_key(path: Path, key: str, value) -> None:
    """Sets a value of a JSON file; dots separate the keys on the way."""
    *outer, last = key.split(".")

    def change(data):
        for name in outer:
            data = data[name]
        data[last] = value

    edit_json(path, change)


def set_column(path: Path, column: str, values) -> None:
    edit_csv(path, lambda table: table.__setitem__(column, values))


@pytest.mark.parametrize("name", FROM)
def test_a_page_repeats_holds_no_placeholder_and_links_to_what_there_is(name):
    text = page(name)
    assert text == page(name)
    assert not re.search(r"\bnan\b|None|\{|\}|<|\bTrue\b|\bFalse\b|Undefined|\n\n\n", text)
    assert set(re.findall(r"\]\((\S*?)\)", text)) <= {
        *(f"dwr/{figure}.png" for figure in FIGURES),
        *(f"{other}.md" for other in FROM),
    }


LINES = {
    "dwr": """\
| 200 | 1.54 | 76,800 | 1.00e-03 | 4.1123 | 61.09 | 4.0523 | 57.53 | new low |
| 260 | 2.00 | 99,840 | 1.00e-03 | 3.9123 | 50.01 | 4.0323 | 56.39 | **best** |
> | 6 | 4.2506 | 70.1 | 5.4181 | 225.5 | **best** |
| Warm-up steps | 51 | 200 |
| Parameters | 60,123 | 259,712,096 |
| 2 | 0.400 | 0.710 | 0.552 | 0.310 | 0.40 | 1.60 | 0.646 | 0.936 | 0.817 | 0.291 |
| 5 | – | – | – | – | – | – | 0.607 | 0.896 | 0.723 | 0.289 |
| 2 | 1.0300 | 2.0600 | 2.0400 | 2.0400 |
| expert files | 12 | 96 |
| backbone | 120.56 KiB | 222 MiB |
| `data/dwr/train/last.safetensors` | 9.00 KiB |
| ✓ | reassembled logits are equal | `export_experts` |
| 4 | 0.308 | 0.318 |
| train | 57 | 400,123 | 100,003 | 6.2500 |
| code | 60,001 | 60,001 | 60,001 |
2.09 below the unigram entropy of the validation text
Not within this run. The last validation loss is the lowest.
The gradient norm before clipping at 1.5 was between 0.900 and 0.900
correlates with depth at +1.00 (Spearman, over 3 layers). It is largest in layer 2.
No. The least used expert gets 0.40 of the uniform load.
`next_use` hits 0.422 of the requests
Yes, all 5 (section 5).""",
    "cached_inference": """\
| 4 | 0.301 | 0.422 | 0.603 |
| 6 | 0.300 | 0.480 | 0.870 |
| 2 | 40.1% |
| `next_use` | 0.422 | 0.320 | 0.422 | 0.320 | 40.1% |
| `lru` | 0.301 | 0.200 | 0.301 | 0.200 | – |
| next_use | 0.318 | 0.318 |
| gate | 76.5% | 65.4% |
| int8 | 3.27 KiB | 4.01770 | +0.00660 |
| lru, none | cold | 23.4 | 1.000 | 1.000 | 1.000 | 0.346 | – |
| warm | offloaded | 13.77 | 6.88 | 27.53 | 15 | 14.12 |
| on disk | 9.87 |
| disk | seed | 0.512 | 0.612 | 6 |
| pcie | seed | 0.212 | 0.312 | – |
| 2 | 32.63 KiB | `next_use` | 0.211 | 0.812 (gate) | 0.512 (gate) |
`next_use` closes 40% of the gap between LRU and MIN. The goal of a third is reached.
It reaches 1 of 3 goals
Warm, to offloaded: all experts resident miss this goal too
a token misses 7.9 of its 12 experts, and one that is read when it is needed takes 9.26 ms
72.7 ms in all. The token takes 42.6 ms, and 24.2 ms with all experts resident. Late hits were not counted.""",
    "dwr_runs": """\
| none | 0 | 260.5 | 0.25 | 1.75 | 0.450 | 0.260 | 0.550 | 0.340 | 0.750 | 0.610 |
| reference | – | 870,561 | 3.000 | 5.500 | +2.500 | 5.400 | 7 | 244.7 | 0.300 |
| more_text | train_windows = 640, training.epochs = 2.5 | 870,560 |
LRU hits most with λ = 0: 0.450 against 0.300 of the reference.""",
    "measured": """\
| processor | A Processor 9000 | Another Processor |
| torch | 2.9.99 | – |
| all, resident | 400 | 1.00 | 0.61 | 1.31 | 12.5% | 45.6 ms | 210.00 MiB | 160.00 MiB | 0 B |
| lru | gate | warm | 406 | 0.94 | 0.61 | 1.31 | 12.5% | 8.79 KiB | 500 B | 400 B | 321 B | 100 B |
| 8,192 | dynaroute | 12.3 | 1.5 | 1.67 |
| plain loop | 4,321 | 46 | 9,876 |
| dynaroute to dense | 0.86 | 0.78–0.90 |
The state of the code is not recorded.""",
}


@pytest.mark.parametrize("name", LINES)
def test_tables_and_sentences_hold_the_numbers_of_the_files(name):
    text = page(name)
    assert [line for line in LINES[name].splitlines() if line not in text] == []


def test_measurements_change_no_page_but_their_own():
    before = [page("dwr"), page("cached_inference")]
    set_column(TIMES, "tokens_per_second", 4321)
    set_key(TIMING, "seconds", 1.0)
    assert [page("dwr"), page("cached_inference")] == before


def test_no_published_number_is_unmarked():
    """Every number of the reference becomes one that nothing else can be, and is then looked for outside the marks."""
    before = page("dwr")
    edit_yaml("reports/reference.yaml", lambda data: data.__setitem__("dwr", strange(data["dwr"])))
    text = page("dwr")
    assert len(STRANGE.findall(text)) > 80  # they are all there
    assert not STRANGE.findall(unmarked(text))
    without_difference = re.compile("Settings that differ.*|No setting differs.*")
    assert without_difference.sub("", unmarked(text)) == without_difference.sub("", unmarked(before))


CHANGES = {
    "It overfits": ("dwr", "validation loss rises by 0.2500 nats while training loss falls",
                    lambda: set_column(CURVE, "validation_loss", [5.8, 4.5, 4.0, 4.25])),
    "Level": ("dwr", "ends 0.0050 nats above its best, which counts as level",
              lambda: set_column(CURVE, "validation_loss", [5.8, 4.5, 4.0, 4.005])),
    "Unstable": ("dwr", "That is instability, not overfitting.", lambda: edit_csv(
        CURVE, lambda curve: curve.assign(validation_loss=[5.8, 4.5, 4.0, 4.25], train_loss=[None, 5, 4, 4.2]))),
    "An untrained model is best": ("dwr", "After step 0, validation loss rises by 1.4500 nats",
                                   lambda: set_column(CURVE, "validation_loss", [5.8, 6.5, 7.0, 7.25])),
    "Nothing learned": ("dwr", "No. Its best validation loss is 4.0323",
                        lambda: set_key(TRAINING, "validation_unigram_entropy", 3.0)),
    "A spike": ("dwr", "training loss rose by up to 1.2500 nats",
                lambda: set_column(CURVE, "train_loss", [None, 4.0, 3.0, 4.25])),
    "Equal spreads": ("dwr", "This run cannot tell.", lambda: set_column(ROUTER, "gate_norm", 1.0)),
    "Collapse": ("dwr", "Yes. 3 of 12 experts get less than 0.1 of the uniform load",
                 lambda: set_column(ROUTER, "load", [0.01, 0.49, 0.48, 0.02] + [0.3, 0.3, 0.39, 0.01] + [0.25] * 4)),
    "A failed check": ("dwr", "**No.** 1 of 5 checks failed",
                       lambda: set_key(TRAINING, "checks.gradient_reaches_every_router", "odd")),
    "Capacity": ("dwr", "The factor is 1.25; the last interval of training dropped 3.21% of its assignments", lambda: [
        set_key(RUN_JSON, "identity.dwr.capacity_factor", 1.25), set_column(CURVE, "train_dropped_share", 0.0321)]),
    "Stopped early": ("dwr", "It ended this run after 3 validations", lambda: set_key(TRAINING, "stopped_early", True)),
    "Never stopped": ("dwr", "It is off",
                      lambda: set_key(RUN_JSON, "identity.dwr.training.early_stopping_patience", None)),
    "A slow precision": ("dwr", "`bf16` is set, but this device would be slow with it, so the run used `fp32`.",
                         lambda: set_key(RUN_JSON, "identity.dwr.training.precision", "bf16")),
    "A dataset": ("dwr", "`docs` is the dataset `some/set`, configuration `part-7`, revision `abc123`.",
                  lambda: SOURCE.write_text(json.dumps(
                      {"path": "some/set", "name": "part-7", "revision": "abc123", "files": {}}))),
    "Files": ("dwr", "`docs` is 1 local file of 1.50 KiB.",
              lambda: SOURCE.write_text(json.dumps({"files": {"a.txt": {"bytes": 1536}}}))),
    "Inexact": ("cached_inference", "**Not shown.** These checks failed: logits are equal in every cell.",
                lambda: set_key(CACHE, "checks.logits_are_equal_in_every_cell", False)),
    "A small gap": ("cached_inference", "The goal of a third is not reached.",
                    lambda: set_column(HITS, "hit_rate", [0.3, 0.35, 0.6] * 4)),
    "No gap": ("cached_inference", "MIN, is not defined here.", lambda: set_column(HITS, "hit_rate", 0.5)),
    "Prefetching helps": ("cached_inference", "On 2 of 2 simulated pairs", lambda: edit_csv(
        SPEEDS, lambda speeds: speeds.assign(ratio_to_resident=0.5 + 0.1 * (speeds["prefetch"] == "gate")))),
    "Late hits": ("cached_inference", "Late hits, 3.0 for each token, add up to 27.8 ms.", lambda: edit_json(
        PEERS, lambda data: data["rows"][1].__setitem__("late_rate", 0.25))),
    "The reference is best": ("dwr_runs", "No other coefficient gives LRU more hits than the reference, 0.300.",
                              lambda: set_key(RUN_RESULTS / "none.json", "hit_rate.lru", 0.1)),
    "Memory": ("measured", "✗ **failed**: memory is bounded.",
               lambda: set_key(TIMED, "checks.memory_is_bounded", False)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_rule_has_a_sentence_for_each_outcome(name):
    where, sentence, change = CHANGES[name]
    assert sentence not in page(where)
    change()
    assert sentence in page(where)


@pytest.mark.parametrize(
    ("lowest", "said"), [(0.9, "cached settings overlap"), (1.1, "lru, gate is faster than lru, none")]
)
def test_settings_whose_rounds_overlap_are_not_told_apart(lowest, said):
    def change(data):
        row = {**data["rows"][1], "name": "lru, gate", "ratio_lowest": lowest, "ratio_highest": lowest + 0.2}
        data["rows"].append(row)

    edit_json(PEERS, change)
    assert said in page("cached_inference")


def test_settings_that_differ_from_the_published_ones_are_named():
    named = re.search(r"Settings that differ from the published run: (.*)\.", page("dwr")).group(1).split(", ")
    assert {"layers", "dropout"} <= set(named)
    assert not {"top_k", "batch (sequences)"} & set(named)


def test_a_long_curve_is_thinned_and_says_so():
    curve = pd.read_csv(CURVE)
    long = pd.concat([curve.iloc[[0]], *[curve.iloc[[1]]] * 99, curve.iloc[[3]]], ignore_index=True)
    long["step"] = range(0, 1010, 10)
    long.loc[57, "validation_loss"] = 3.0
    long.to_csv(CURVE, index=False)
    text = page("dwr").split("## 2.")[1].split("> ")[0]
    rows = table_rows(text)[2:]
    assert len(rows) <= 24
    assert {"0", "570", "1,000"} <= {row[0] for row in rows}
    assert f"The table leaves out {101 - len(rows)} of 101 validations" in text


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in FROM.items() for path in paths], ids=str)
@pytest.mark.parametrize("content", [None, b"["])
def test_an_input_that_is_missing_or_damaged_is_named(name, path, content):
    path.unlink() if content is None else path.write_bytes(content)
    if content is None and path in (PEERS, MOE):
        assert "Not measured" in page(name)
        return
    with pytest.raises(DynarouteError, match=rf"^{re.escape(str(path))}[:,] [^\n]*$"):
        page(name)


@pytest.mark.parametrize(
    ("name", "path"),
    [("dwr", TRAINING), ("dwr", EXPORT), ("cached_inference", CACHE), ("dwr", SIMULATION), ("measured", TIMED)],
)
def test_results_of_another_run_are_refused(name, path):
    set_key(path, "run", "fedcba")
    with pytest.raises(DynarouteError, match="belongs to run "):
        page(name)


def test_results_that_do_not_fit_their_settings_or_tokens_are_refused():
    set_key(RUN_RESULTS / "wide.json", "settings.dropout", 0.3)
    with pytest.raises(DynarouteError, match=r"wide\.json: of other settings than dwr_runs\.wide: run dvc repro"):
        page("dwr_runs")
    path = Path("data/tokens/docs/metadata.json")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DynarouteError, match=rf"^{path}: not the tokens"):
        page("dwr")
    edit_csv(TIMES, lambda timing: timing.drop(columns="policy"))
    with pytest.raises(DynarouteError, match=r"cells\.csv: 'policy' must be empty in the first row"):
        page("measured")


def test_the_sweep_is_what_differs_in_the_balance_coefficient_alone_by_that():
    found = runs.read_runs(settings_with_runs())
    assert found[0]["name"] == "reference"
    assert [run["name"] for run in runs.sweep(found)] == ["none", "reference", "strong"]


def draw_and_write() -> None:
    write_json("data/dagformer/report/summary.json", {"nll_P1": 5.0})
    write_text("data/dagformer/report/measured.md", "## DAGFormer\n")
    for name in ("plot_dwr", "report_dwr", "report_cached_inference", "report_dwr_runs", "summarize"):
        stage(name).main(settings_with_runs())


def test_stages_write_pages_figures_and_the_summary_the_same_every_time(tree):
    figures = [f"reports/dwr/{name}.png" for name in FIGURES]
    written = [
        *figures,
        *(f"reports/{name}" for name in ("dwr.md", "cached_inference.md", "dwr_runs.md", "measured.md")),
    ]
    draw_and_write()
    first = hashes(*written)
    (tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")  # a user's own taste
    draw_and_write()
    assert hashes(*written) == first
    assert page("measured") in Path("reports/measured.md").read_text()
    assert "## DAGFormer" in Path("reports/measured.md").read_text()
    numbers = json.loads(Path("reports/summary.json").read_text())
    assert numbers["dagformer"] == {"nll_P1": 5.0}
    numbers = numbers["dwr"]
    assert (numbers["validation_loss"], numbers["hit_rate_lru"], numbers["failed_checks"]) == (4.0323, 0.3011, 0)
    for path, column in ((CURVE, "validation_loss"), (ROUTER, "gate_norm"), (HITS, "hit_rate")):
        edit_csv(path, lambda table, column=column: table.__setitem__(column, table[column] * 0.9))
    set_key(RUN_RESULTS / "strong.json", "test_loss", 5.1)
    draw_and_write()
    assert not {figure for figure in figures if hashes(figure)[figure] == first[figure]}


def test_a_model_of_one_layer_and_a_single_validation_has_a_page_and_figures():
    edit_csv(ROUTER, lambda router: router[router["layer"] == 0])
    edit_csv(CURVE, lambda curve: curve.iloc[[0, 3]])
    draw_and_write()
