"""The DWR pages say what the stages' files say: whatever number changes there, changes here."""

import json
import re
from importlib import import_module as stage
from pathlib import Path

import pytest
from dwr_tree import RUN, edit_csv, edit_json, edit_yaml, settings_with_runs
from report_checks import STRANGE, hashes, strange, unmarked

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.reporting.dwr import cached_inference, measured, report, runs
from dynaroute.reporting.dwr.results import read_benchmark, read_cached, read_measurements
from dynaroute.reporting.inputs import read_record

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
FIGURES = {"routers": ROUTER, "hit_rates": HITS} | dict.fromkeys(("training_curves", "gate_norms", "runs"), RUN_RESULTS)
FROM = {
    "dwr": [RUN_JSON, TRAINING, CURVE, ROUTER, EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS,
            Path("reports/reference.yaml"), Path("data/tokens/docs/metadata.json"), SOURCE],
    "cached_inference": [EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS, PEERS],
    "dwr_runs": [RUN_RESULTS / "strong.json", Path("reports/reference.yaml")],
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
            found = runs.read_runs(settings_with_runs())
            return runs.page(found, read_benchmark("balance"), read_record("reports/reference.yaml")["dwr"])
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
It trained on 1.00 times the 100,003 tokens of its text
| Warm-up steps | 51 | 200 |
| Parameters | 60,123 | 259,712,096 |
| 2 | 0.400 | 0.710 | 0.552 | 0.40 | 1.60 |
| 2 | 1.0300 | 2.0600 | 2.0400 | 2.0400 |
| expert files | 12 | 96 |
| backbone | 120.56 KiB | 222 MiB |
| `data/dwr/train/last.safetensors` | 9.00 KiB |
| ✓ | reassembled logits are equal | `export_experts` |
| 4 | 0.308 | 0.318 |
| train | 57 | 400,123 | 100,003 | 6.2500 |
| code | 60,001 | 60,001 | 60,001 |
2.09 below the unigram entropy of the validation text
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
| 2 | 4.0e-03 | 1.020 | 5.5000 | 244.7 | 5.0625 | 158.0 | **best** | – | – | – | – |
| 6 | – | – | – | – | – | – | – | 4.2506 | 70.1 | 5.4181 | 225.5 |
| 2 | 0.000 | 0.150 | 0.450 | 0.170 | 0.300 | 0.400 [0.152, 0.648] | 0.646 | 0.936 | 0.817 | 0.291 |
| 5 | – | – | – | – | – | – | 0.607 | 0.896 | 0.723 | 0.289 |
| none | 0 | 3 | 158.0 | 0.25 | 1.75 | 0.450 | 0.260 | 0.550 | 0.340 | 0.750 | 0.610 |
| reference | – | 870,561 | 3.500 | 5.312 | +1.812 | 5.062 | 2 | 148.4 | 0.300 |
| more_text | train_windows = 640, training.epochs = 5.0 | 870,560 |
The gradient norm before clipping at 1, averaged over an epoch, was between 0.900 and 0.900
Yes. The weakest, `more_text`, has a test perplexity of 190.6, 2.59 times below the unigram perplexity, 492.7.
epoch 2, 2 and 2 of 4, and then rises by 0.2500, 0.2500 and 0.2500 nats
The spread of gate norms grows by +0.133 [+0.062, +0.205] from a layer to the next, over 3 seeds.
`none` stopped after 3 of 4 epochs, 2 validations after its best, and saved 25% of its steps.
LRU hits most with λ = 0: 0.450 against 0.300 to 0.340 of the reference's 3 seeds.""",
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


@pytest.mark.parametrize(("name", "numbers"), [("dwr", 30), ("dwr_runs", 45)])
def test_no_published_number_is_unmarked(name, numbers):
    """Every number of the reference becomes one that nothing else can be, and is then looked for outside the marks."""
    before = page(name)

    def change(data):
        epochs, layers = ([row[key] for row in data["dwr"][table]["rows"]] for table, key in INDEXED)
        data["dwr"] = strange(data["dwr"])
        for (table, key), kept in zip(INDEXED, (epochs, layers), strict=True):
            for row, value in zip(data["dwr"][table]["rows"], kept, strict=True):
                row[key] = value  # by which rows are joined with ours

    edit_yaml("reports/reference.yaml", change)
    text = page(name)
    assert len(STRANGE.findall(text)) > numbers  # they are all there
    assert not STRANGE.findall(unmarked(text))
    without_difference = re.compile("Settings that differ.*|No setting differs.*")
    assert without_difference.sub("", unmarked(text)) == without_difference.sub("", unmarked(before))


INDEXED = (("training_curve", "epoch"), ("gate_norms", "layer"))


def set_losses(*losses: float, seeds: tuple[str, ...] = ("reference", "seed_1", "seed_2"), train: float = 3.5) -> None:
    """Sets the validation losses after the best epoch, and the last training loss, of runs with that seed."""

    def change(data):
        for row, loss in zip(data["history"][-len(losses) :], losses, strict=True):
            row["validation_loss"] = loss
        data["history"][-1]["train_loss"] = train

    for seed in seeds:
        edit_json(RUN_RESULTS / f"{seed}.json", change)


def set_spreads(*spreads: float, seeds: tuple[str, ...] = ("reference", "seed_1", "seed_2")) -> None:
    """Sets the last spread of gate norms by layer, the same for all those seeds."""

    def change(data):
        for layer, spread in enumerate(spreads):
            data["history"][-1][f"validation_gate_norm_max_layer{layer}"] = 0.15 + spread

    for seed in seeds:
        edit_json(RUN_RESULTS / f"{seed}.json", change)


def write_balance(*lru: float) -> None:
    """Writes the benchmark of the balance loss: hits of LRU by seed with lambda 0; with 0.01 they are 0.3."""
    rates = [(0.0, rate) for rate in lru] + [(0.01, 0.3)] * len(lru)
    others = dict.fromkeys(("test_loss", "next_use", "smallest_load", "largest_load"), 1.0)
    rows = [{"lambda": coefficient, "lru": rate, **others} for coefficient, rate in rates]
    write_json("reports/benchmarks/balance.json", {"reference": "1", "rows": rows})


CHANGES = {
    "It overfits with some seeds": ("dwr_runs", "It cannot be answered at this scale: 2 of 3 seeds overfit.",
                                    lambda: set_losses(5.06, 5.05, seeds=("seed_1",))),
    "Level": ("dwr_runs", "ends 0.0050 nats above its best, which counts as level",
              lambda: set_losses(5.0625, 5.0675)),
    "Lowest": ("dwr_runs", "The last validation loss is the lowest.", lambda: set_losses(5.05, 5.0)),
    "Unstable": ("dwr_runs", "That is instability, not overfitting.", lambda: set_losses(5.1, 5.2, train=5.6)),
    "A spike": ("dwr_runs", "training loss rose by up to 1.5000 nats", lambda: set_losses(5.1, 5.2, train=6.0)),
    "Depth unknown": ("dwr_runs", "+0.067 [-0.292, +0.425] from a layer to the next, over 3 seeds: the interval",
                      lambda: set_spreads(0.4, 0.3, 0.2, seeds=("reference",))),
    "Deeper is less": ("dwr_runs", "No, less. The spread of gate norms changes by -0.100 [-0.100, -0.100]",
                       lambda: set_spreads(0.3, 0.2, 0.1)),
    "Too little learned": ("dwr_runs", "Not all. `strong` has a test perplexity of 403.4",
                           lambda: set_key(RUN_RESULTS / "strong.json", "test_loss", 6.0)),
    "Never stopped": ("dwr_runs", "Nothing here: no run was stopped.",
                      lambda: set_key(RUN_RESULTS / "none.json", "steps", 40)),
    "No clear coefficient": ("dwr_runs", "LRU hits most with λ = 0, 0.335, but a seed of the reference reaches 0.340.",
                             lambda: set_key(RUN_RESULTS / "none.json", "hit_rate.lru", 0.335)),
    "More hits": ("dwr_runs", "With λ = 0, the hit rate of LRU minus that of the reference is +0.200 [+0.076, +0.324].",
                  lambda: write_balance(0.45, 0.5, 0.55)),
    "Hits unknown": ("dwr_runs", "Whether LRU hits more with λ = 0 cannot be answered at this scale",
                     lambda: write_balance(0.2, 0.5, 0.55)),
    "Nothing learned": ("dwr", "No. Its best validation loss is 4.0323",
                        lambda: set_key(TRAINING, "validation_unigram_entropy", 3.0)),
    "Collapse": ("dwr", "Yes. 3 of 12 experts get less than 0.1 of the uniform load",
                 lambda: set_column(ROUTER, "load", [0.01, 0.49, 0.48, 0.02] + [0.3, 0.3, 0.39, 0.01] + [0.25] * 4)),
    "A failed check": ("dwr", "**No.** 1 of 5 checks failed",
                       lambda: set_key(TRAINING, "checks.gradient_reaches_every_router", "odd")),
    "Capacity": ("dwr", "The factor is 1.25; the last interval of training dropped 3.21% of its assignments", lambda: [
        set_key(RUN_JSON, "identity.dwr.capacity_factor", 1.25), set_column(CURVE, "train_dropped_share", 0.0321)]),
    "Stopped early": ("dwr", "It ended this run after 3 validations", lambda: set_key(TRAINING, "stopped_early", True)),
    "No patience": ("dwr", "It is off",
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
    set_key(RUN_RESULTS / "strong.json", "settings.dropout", 0.3)
    with pytest.raises(DynarouteError, match=r"strong\.json: of other settings than dwr_runs\.strong: run dvc repro"):
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
    set_losses(5.2, 5.4)
    set_spreads(0.1, 0.1, 0.1)
    draw_and_write()
    assert not {figure for figure in figures if hashes(figure)[figure] == first[figure]}


def test_a_model_of_one_layer_and_a_single_validation_has_a_page_and_figures():
    edit_csv(ROUTER, lambda router: router[router["layer"] == 0])
    edit_csv(CURVE, lambda curve: curve.iloc[[0, 3]])
    draw_and_write()
