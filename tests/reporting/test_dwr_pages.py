"""The DWR pages say what the stages' files say: whatever number changes there, changes here."""

import json
import re
from importlib import import_module as stage
from pathlib import Path

import pytest
from dwr_tree import edit_csv, edit_json, edit_yaml, settings_with_runs
from report_checks import STRANGE, assert_readable, hashes, strange, unmarked

from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json, write_text
from dynaroute.reporting.dwr import cached_inference, measured
from dynaroute.reporting.dwr import page as dwr
from dynaroute.reporting.dwr.findings import sweep
from dynaroute.reporting.dwr.results import read_cached, read_runs
from dynaroute.reporting.inputs import read_benchmark, read_record
from dynaroute.reporting.pages import render

CURVE, ROUTER, HITS = (Path(f"reports/dwr/{name}.csv") for name in ("training", "router", "simulated_hits"))
RUN_JSON, TRAINING, EXPORT, CACHE, SIMULATION = (
    Path(f"data/dwr/{name}.json")
    for name in ("train/run", "train/summary", "export/summary", "cache/summary", "simulation/summary")
)
CELLS, SPEEDS = Path("data/dwr/cache/cells.csv"), Path("data/dwr/simulation/speed.csv")
TIMING, TIMED, TIMES = (
    Path(f"data/dwr/measured/{name}") for name in ("training.json", "cache/summary.json", "cache/cells.csv")
)
PEERS, MOE = (Path(f"reports/benchmarks/{name}.json") for name in ("hub_moe", "moe"))
RUN_RESULTS, SOURCE = Path("data/dwr/run_results"), Path("data/inputs/corpora.docs.source.json")
FIGURES = ("hit_rates", "training_curves", "gate_norms", "runs")
FROM = {
    "dwr": [RUN_JSON, TRAINING, CURVE, ROUTER, EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS,
            Path("reports/reference.yaml"), Path("data/tokens/docs/metadata.json"), SOURCE,
            RUN_RESULTS / "strong.json"],
    "cached_inference": [EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS, PEERS],
    "measured": [TIMING, TIMED, TIMES, CACHE, MOE],
}  # fmt: skip


WORDS = {"dwr": 1500, "cached_inference": 1200, "measured": 700}  # of prose, at most


pytestmark = pytest.mark.usefixtures("tree")


def page(name: str) -> str:
    match name:
        case "dwr" | "dwr_summary":
            return render(f"{name}.md", dwr.values(dwr.read_results(settings_with_runs())))
        case "cached_inference":
            found = cached_inference.values(read_cached(), read_benchmark("hub_moe"))
            return render("cached_inference.md", found)
    reference = read_record("reports/reference.yaml")["dwr"]["timing"]
    return measured.section(read_cached().summary, read_benchmark("moe"), reference)


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
    assert_readable(text, WORDS[name])
    assert set(re.findall(r"\]\((\S*?)\)", text)) <= {
        "benchmarks/hub_moe.png",
        *(f"dwr/{figure}.png" for figure in FIGURES),
        *(f"{other}.md" for other in FROM),
    }


LINES = {
    "dwr": """\
| Learning rate | 0.002, 51 warm-up steps, cosine to 0.0002 |
| Parameters | 60,123 | 870,561 | 259,712,096 |
| 2 | 0.400 | 0.710 | 0.552 | 0.400 | 1.600 | 1.0300 | 2.0600 |
| 12 × 16.32 KiB | 96 × 8.1 MiB |
| 120.56 KiB | 222 MiB |
| the full resume state, optimizer included | 9.00 KiB | 3.0 GB |
| ✓ | reassembled logits are equal | `export_experts` |
| train | 57 | 100,003 | 6.250 | 60,001 | 40,002 |
the unigram entropy of the validation text is 6.1250
In the main model the least used expert gets 0.40 of the uniform load
| 2 | 5.5000 | 244.7 | 5.0625 | 158.0 | best |
> | 6 | 4.2506 | 70.1 | 5.4181 | 225.5 | Best val |
| 2 | 0.150 | 0.450 | 0.170 | 0.300 | 0.000 | 0.400 [0.152, 0.648] |
> | 5 | 0.607 | 0.896 | 0.723 | 0.289 |
| none | balance_coefficient 0.0, training.early_stopping_patience 2 | 3 | 158.0 | +0.62 | 0.25 | 1.75 | 0.450 |
| uniform routing | – | – | – | – | – | – | 0.260 | 0.340 | 0.610 |
The weakest small run, `more_text`, is 0.95 nats below
Yes, with every seed. Validation loss is lowest at epoch 2, 2 and 2 of 4 and ends 0.2500, 0.2500 and 0.2500 nats above
changes by +0.133 [+0.062, +0.205] from a layer to the next, over 3 seeds
With λ = 0, LRU's hit rate changes by +0.150.
Between seeds of the reference it differs by up to 0.040 (section 6)""",
    "dwr_summary": """\
`next_use` hits 0.422 of the requests, LRU with a share for each layer 0.301, the optimum, which knows the future, 0.603
equal those of the resident model to the bit
With 3 of 3 seeds""",
    "cached_inference": """\
| lru | 0.151 | 0.301 | 0.452 |
| min | 0.302 | 0.603 | 0.905 |
| `next_use` | 0.320 | 40% | 0.422 | 0.320 | 40% |
| `lru` | 0.200 | – | 0.301 | 0.200 | – |
| 4 | 0.308 | 0.308 | 0.318 | 0.318 |
| gate | 76.5% | 65.4% |
| int8 | 3.27 KiB | 4.01770 |
Experts in int8 change the NLL by +0.00660 nats per token
| ours, shards | bf16 | 5.0 GiB | 0.35 | 3.00 MiB | 1.23 | 3.46 | 2.50 to 4.50 | 1.00 | 46% | disk |
| llama.cpp | int8 | none | – | – | – | – | – | – | – | – |
`llama.cpp`, limit none: not installed.
| warm | ours, shards | resident | 8.77 | 4.38 | 17.53 | 10 |
| disk | seed | 0.612 | 0.512 | 6 |
| pcie | seed | 0.312 | 0.212 | – |
It closes 40% of the gap between LRU and the optimum
It reaches 1 of 3 goals""",
    "measured": """\
| all, resident | 400 | 1.00 (0.61–1.31) | 12% | 45.6 ms | 210.00 MiB | 0 B |
| lru | gate | warm | 406 | 0.94 (0.61–1.31) | 12% | 8.79 KiB | 100 B |
| dynaroute | 1.67 |
| plain loop | 4,321 | 46 | 9,876 |
Tokens/s of dynaroute to dense: ratio 0.86, quartiles 0.78 to 0.90.""",
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

    def change(data):
        epochs, layers = ([row[key] for row in data["dwr"][table]["rows"]] for table, key in INDEXED)
        data["dwr"] = strange(data["dwr"])
        for (table, key), kept in zip(INDEXED, (epochs, layers), strict=True):
            for row, value in zip(data["dwr"][table]["rows"], kept, strict=True):
                row[key] = value  # by which rows are joined with ours

    edit_yaml("reports/reference.yaml", change)
    text = page("dwr")
    assert len(STRANGE.findall(text)) > 75  # they are all there
    assert not STRANGE.findall(unmarked(text))
    assert unmarked(text) == unmarked(before)


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
    "It overfits with some seeds": ("dwr", "With 2 of 3 seeds.", lambda: set_losses(5.06, 5.05, seeds=("seed_1",))),
    "Level": ("dwr", "Not within these runs.", lambda: set_losses(5.0625, 5.0675)),
    "Unstable": ("dwr", "Not within these runs.", lambda: set_losses(5.1, 5.2, train=5.6)),
    "A rise": ("dwr", "training loss rose by at most 1.5000", lambda: set_losses(5.1, 5.2, train=6.0)),
    "Depth": ("dwr", "changes by -0.100 [-0.100, -0.100] from a layer", lambda: set_spreads(0.3, 0.2, 0.1)),
    "More hits": ("dwr", "| 1.000 [1.000, 1.000] | 0.500 [0.376, 0.624] | +0.200 [+0.076, +0.324] |",
                  lambda: write_balance(0.45, 0.5, 0.55)),
    "A failed check": ("dwr_summary", "Its checks failed: gradient reaches every router",
                       lambda: set_key(TRAINING, "checks.gradient_reaches_every_router", "odd")),
    "Capacity": ("dwr", "| Expert capacity factor | 1.25 |",
                 lambda: set_key(RUN_JSON, "identity.dwr.capacity_factor", 1.25)),
    "A slow precision": ("dwr", "| Precision | fp64 |", lambda: set_key(TRAINING, "precision", "fp64")),
    "A dataset": ("dwr", "`docs` is the dataset `some/set`, configuration `part-7`, revision `abc123`.",
                  lambda: SOURCE.write_text(json.dumps(
                      {"path": "some/set", "name": "part-7", "revision": "abc123", "files": {}}))),
    "Files": ("dwr", "`docs` is 1 local file of 1.50 KiB.",
              lambda: SOURCE.write_text(json.dumps({"files": {"a.txt": {"bytes": 1536}}}))),
    "Inexact": ("cached_inference", "**Not shown.** These checks failed: logits are equal in every cell.",
                lambda: set_key(CACHE, "checks.logits_are_equal_in_every_cell", False)),
    "No gap": ("cached_inference", "(section 2). - **Does prefetching help?**",
               lambda: set_column(HITS, "hit_rate", 0.5)),
    "Prefetching helps": ("cached_inference", "faster on 2, and nowhere slower than 1.200", lambda: edit_csv(
        SPEEDS, lambda speeds: speeds.assign(ratio_to_resident=0.5 + 0.1 * (speeds["prefetch"] == "gate")))),
    "No limit": ("cached_inference", "**No limit was enforced**", lambda: set_key(PEERS, "limited", False)),
    "Memory": ("measured", "Check, memory is bounded: ✗ **failed**.",
               lambda: set_key(TIMED, "checks.memory_is_bounded", False)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_rule_has_a_sentence_for_each_outcome(name):
    where, sentence, change = CHANGES[name]
    assert sentence not in page(where).replace("\n", " ")
    change()
    assert sentence in page(where).replace("\n", " ")


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in FROM.items() for path in paths], ids=str)
@pytest.mark.parametrize("content", [None, b"["])
def test_an_input_that_is_missing_or_damaged_is_named(name, path, content):
    path.unlink() if content is None else path.write_bytes(content)
    if content is None and path in (PEERS, MOE):
        assert "Not measured" in page(name)
        return
    with pytest.raises(DynarouteError, match=rf"^{re.escape(str(path))}[:,] [^\n]*$"):
        page(name)


def test_the_sweep_is_what_differs_in_the_balance_coefficient_alone_by_that():
    found = read_runs(settings_with_runs())
    assert found[0]["name"] == "reference"
    assert [run["name"] for run in sweep(found)] == ["none", "reference", "strong"]


def draw_and_write() -> None:
    write_json("data/dagformer/report/summary.json", {"nll_P1": 5.0})
    write_json("data/inputs/scales.json", {})
    for name in ("measured", "summary"):
        write_text(f"data/dagformer/report/{name}.md", "## DAGFormer\n")
    for name in ("plot_dwr", "report_dwr", "report_cached_inference", "summarize"):
        stage(name).main(settings_with_runs())


def test_stages_write_pages_figures_and_the_summary_the_same_every_time(tree):
    figures = [f"reports/dwr/{name}.png" for name in FIGURES]
    written = [
        *figures,
        *(f"reports/{name}" for name in ("dwr.md", "cached_inference.md", "summary.md", "measured.md")),
    ]
    draw_and_write()
    first = hashes(*written)
    (tree / "matplotlibrc").write_text("font.size: 30\nbackend: tkagg\n")  # a user's own taste
    draw_and_write()
    assert hashes(*written) == first
    assert page("measured") in Path("reports/measured.md").read_text()
    assert "## DAGFormer" in Path("reports/measured.md").read_text()
    assert page("dwr_summary") in Path("reports/summary.md").read_text()
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
