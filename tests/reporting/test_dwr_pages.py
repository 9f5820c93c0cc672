"""The DWR pages say what the stages' files say, and mark what was published."""

import json
import math
import re
from importlib import import_module as stage
from pathlib import Path

import benchmark_locality
import pandas as pd
import pytest
from report_checks import STRANGE, assert_readable, edit_csv, edit_json, edit_yaml, strange, unmarked

from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, write_csv, write_json
from dynaroute.reporting.dwr import cached_inference, measured
from dynaroute.reporting.dwr import page as dwr
from dynaroute.reporting.dwr.findings import sweep
from dynaroute.reporting.dwr.results import read_cached, read_runs
from dynaroute.reporting.inputs import read_benchmark
from dynaroute.reporting.pages import render
from dynaroute.reporting.tables import perplexity, size

CURVE, ROUTER, HITS = (Path(f"reports/dwr/{name}.csv") for name in ("training", "router", "simulated_hits"))
RUN_JSON, TRAINING, EXPORT, CACHE, SIMULATION, TIMING, TIMED = (
    Path(f"data/dwr/{name}.json")
    for name in ("train/run", "train/summary", "export/summary", "cache/summary", "simulation/summary",
                 "measured/training", "measured/cache/summary")
)  # fmt: skip
CELLS, SPEEDS, TIMES = (
    Path(f"data/dwr/{name}.csv") for name in ("cache/cells", "simulation/speed", "measured/cache/cells")
)
PEERS, MOE = (Path(f"reports/benchmarks/{name}.json") for name in ("hub_moe", "moe"))
REFERENCE, SOURCE = Path("data/dwr/run_results/reference.json"), Path("data/inputs/corpora.docs.source.json")
TOKENS, PUBLISHED = Path("data/tokens/docs/metadata.json"), Path("reports/reference.yaml")
FROM = {
    "dwr": [RUN_JSON, TRAINING, CURVE, ROUTER, EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS, PUBLISHED, TOKENS,
            SOURCE, REFERENCE],
    "cached_inference": [EXPORT, CACHE, CELLS, SIMULATION, HITS, SPEEDS, PEERS],
    "measured": [TIMING, TIMED, TIMES, CACHE, MOE],
}  # fmt: skip
FIGURES = [Path(f"reports/dwr/{name}.png") for name in ("hit_rates", "training_curves", "gate_norms", "runs")]
SEEDS = ("reference", "seed_1", "seed_2")


def page(name: str) -> str:
    match name:
        case "dwr" | "dwr_summary":
            return render(f"{name}.md", dwr.values(dwr.read_results(load_settings())))
        case "cached_inference":
            return render(f"{name}.md", cached_inference.values(read_cached(), read_benchmark("hub_moe")))
    timing = read_record(PUBLISHED)["dwr"]["timing"]
    return measured.section(read_cached().summary, read_benchmark("moe"), timing)


def set_key(path: Path, key: str, value) -> None:
    """Sets a value of a JSON file; dots separate the keys on the way."""
    *outer, last = key.split(".")

    def change(data):
        for name in outer:
            data = data[name]
        data[last] = value

    edit_json(path, change)


def add_runs() -> None:
    """Runs that differ from the reference in a seed or the balance loss, and found the same."""
    runs = {"seed_1": {"seed": 1}, "seed_2": {"seed": 2}, "none": {"balance_coefficient": 0.0}}
    own = {name: {"corpus": "docs", **changes} for name, changes in runs.items()}
    edit_yaml("params.yaml", lambda params: params["dwr_runs"].update(own))
    for name in runs:
        record = read_record(REFERENCE) | {"name": name, "settings": load_settings().dwr_run(name).model_dump()}
        write_json(REFERENCE.with_stem(name), record)


def edit_seeds(change, names=SEEDS) -> None:
    for name in names:
        edit_json(REFERENCE.with_stem(name), lambda data: change(data["history"][-2], data["history"][-1]))


def test_pages_hold_no_placeholder_and_link_to_what_there_is(finished):
    longest = {"dwr": 1500, "cached_inference": 1200, "measured": 1400, "dagformer": 2500, "summary": 900}
    for name, words in longest.items():
        text = (finished.root / f"reports/{name}.md").read_text("utf-8")
        assert_readable(text, words)
        for link in re.findall(r"\]\((\S*?)\)", text):
            assert (finished.root / "reports" / link).is_file(), (name, link)


def test_tables_and_sentences_hold_the_numbers_of_the_files(tree):
    add_runs()
    training, export, cache, simulation = map(read_record, (TRAINING, EXPORT, CACHE, SIMULATION))
    reference, splits = read_record(REFERENCE), read_record(TOKENS)["splits"]
    curve, router, hits, cells = map(pd.read_csv, (CURVE, ROUTER, HITS, CELLS))
    first, last, norm = reference["history"][0], reference["history"][-1], "validation_gate_norm_{}_layer1".format
    own, best = router[router["layer"] == 1], curve.loc[curve["validation_loss"].idxmin()]
    share = len(own) * own["load"]
    lru = hits[(hits["policy"] == "lru") & ~hits["per_layer"]]["hit_rate"]
    rates, uniform = reference["hit_rate"], reference["uniform_hit_rate"]
    gap, int8 = last["validation_loss"] - last["train_loss"], export["precisions"][2]
    decoding = cells[cells["capacity"] == 3]["decode_hit_rate"]
    resident, resume_state = pd.read_csv(TIMES).iloc[0], Path("data/dwr/train/last.safetensors").stat().st_size
    start, least, most, mean = first[norm("max")] - first[norm("min")], *(last[norm(m)] for m in ("min", "max", "mean"))
    cells_of = " | ".join
    expected = {
        "dwr": [
            f"| Parameters | {training['parameters']:,} | {reference['parameters']:,} | 259,712,096 |",
            f"| train | {splits['train']['num_documents']:,} | {splits['train']['num_tokens']:,} |",
            f"entropy of the validation text is {training['validation_unigram_entropy']:.4f}",
            f"| {export['expert_files']} × {size(export['expert_file_bytes'])} | 96 × 8.1 MiB |",
            f"| the full resume state, optimizer included | {size(resume_state)} |",
            "| ✓ | reassembled logits are equal to the bit | `export_experts` |",
            f"| 2 | {last['train_loss']:.4f} | {perplexity(last['train_loss'])} | {last['validation_loss']:.4f} | "
            f"{perplexity(last['validation_loss'])} | best |",
            f"| 1 | {least:.3f} | {most:.3f} | {mean:.3f} | {most - least:.3f} | {start:.3f} |",
            "| " + cells_of(f"{getattr(own['gate_norm'], name)():.3f}" for name in ("min", "max", "mean"))
            + f" | {share.min():.3f} | {share.max():.3f} | {best['validation_balance_layer1']:.4f} |",
            f"least used expert gets {(4 * router['load']).min():.2f} of the uniform load",
            f"| none | balance_coefficient 0.0 | 2 | {perplexity(reference['test_loss'])} | {gap:+.2f} | "
            f"{reference['smallest_load']:.2f} | {reference['largest_load']:.2f} | {rates['lru']:.3f} |",
            "| uniform routing | – | – | – | – | – | – | "
            + cells_of(f"{uniform[name]:.3f}" for name in ("lru", "next_use", "min")),
            "With λ = 0, LRU's hit rate changes by +0.000.",
        ],
        "dwr_summary": [f"which knows the future, {simulation['hit_rate']['min']:.3f}", "With 0 of 3 seeds"],
        "cached_inference": [
            f"| lru | {cells_of(f'{rate:.3f}' for rate in lru)} |",
            f"| 3 | {cells_of(f'{rate:.3f}' for rate in decoding)} |",
            f"| int8 | {size(int8['expert_bytes'])} | {int8['nll']:.5f} |",
            f"Experts in int8 change the NLL by {int8['nll'] - export['precisions'][0]['nll']:+.5f} nats per token",
            f"{cache['prompts']} prompts of {cache['prompt_tokens']} tokens",
        ],
        "measured": [
            f"| all, resident | {resident['tokens_per_second']:,.0f} | 1.00 (1.00–1.00) | 0% |",
            f"at {read_record(TIMING)['tokens_per_second']:,.0f} tokens/s",
        ],
    }  # fmt: skip
    for name, lines in expected.items():
        text = page(name)
        assert [line for line in lines if line not in text] == []
    assert [run["name"] for run in sweep(read_runs(load_settings()))] == ["none", "reference"]


def write_peers() -> None:
    """Writes a benchmark of peers as benchmark_hub_moe does: one row in limited memory, one not measured."""
    row = {"name": "ours, shards", "precision": "bf16", "threads": 1, "limit_bytes": 5 * 2**30, "hit_rate": 0.3456}
    row |= {"read_bytes": 3 * 2**20, "cold": 1.234, "warm": 3.456, "lowest": 2.5, "highest": 4.5, "ratio": 1.0}
    row |= {"share": 0.456, "bound_by": "disk"}
    missing = {"name": "llama.cpp", "precision": "int8", "threads": 1, "limit_bytes": None, "note": "not installed"}
    goal = {"page_cache": "warm", "name": "ours, shards", "against": "resident", "value": 8.77, "goal": 10.0}
    goals = [goal | {"lowest": 4.38, "highest": 17.53}, goal | {"lowest": 9.0, "value": 12.0, "highest": 20.0}]
    peers = {"experts": 1024, "experts_per_token": 128, "model_bytes": 2**30, "tokens": {"cold": 4, "warm_up": 24}}
    peers |= {"limited": True, "memory_bandwidth": 10 * 2**30, "disk_bandwidth": 2**30, "goals": goals}
    write_json(PEERS, peers | {"rows": [row, missing]})


def write_locality(run: str, smallest_load: float = 0.5) -> None:
    """Writes the benchmark of locality at both sizes: each setting hits 0.1 more than the one before, the first 0.2."""
    found = {}
    for number, name in enumerate(("reference", *LOCALITY)):
        hits = {f"{policy}_third": 0.2 + number / 10 for policy in ("lru", "lru_per_layer", "min")}
        exact = hits | {"tokens_per_second_disk": 40.0}
        routing = {"exact": exact, "inexact 1": exact | {"loss": math.log(120), "kl": 0.25}}
        routing |= dict.fromkeys(("shuffled text", "shuffled routing"), hits)
        own = {"run": run, "test_loss": math.log(100), "smallest_load": smallest_load, "largest_load": 1.5}
        found[name] = [own | {"routing": routing}] * 3
    for scale in ("reference", "larger"):
        write_csv(f"reports/benchmarks/locality_{scale}.csv", benchmark_locality.table(found))


LOCALITY = ("lambda_0", "loss_free", "reuse", "prior", "recipe", "recipe_reuse_0.1", "recipe_prior")


def test_benchmarks_are_on_their_pages(tree):
    write_peers()
    text, moe = page("cached_inference"), read_record(MOE)["training"]
    row = "| ours, shards | bf16 | 5.0 GiB | 0.35 | 3.00 MiB | 1.23 | 3.46 (2.50–4.50) | 1.00 | 46% | disk |"
    assert row in text
    assert "`llama.cpp`, limit none: not installed." in text
    assert "| warm | ours, shards | resident | 8.77 | 4.38 | 17.53 | 10 |" in text
    assert "It reaches 1 of 2 goals" in text
    assert_readable(text, 1200)
    assert f"ratio {moe['tokens_per_second_ratios']['dynaroute_to_dense']['ratio']:.2f}" in page("measured")


def test_the_benchmark_of_locality_is_shown_beside_its_own_reference_alone(tree):
    write_locality("of another reference")
    assert "were not run" in page("dwr")
    write_locality(read_record(REFERENCE)["run"])
    text = page("dwr")
    for name, number in (("reference", 2), ("recipe", 7)):
        assert f"| {name} | 100.0 [100.0, 100.0] | 0.50 | 1.50 |{f' 0.{number}00 |' * 3} 40 | – |" in text
        assert f"| {name}, inexact 1 | 120.0 [120.0, 120.0] | – | – |{f' 0.{number}00 |' * 3} 40 | 0.250 |" in text
    assert "lambda_0, inexact 1" not in text
    assert f"| recipe | 100.0 [100.0, 100.0] | 0.50 | 1.50 |{' 0.700 |' * 3} yes |" in text  # at the main model's size
    for sentence in ("LRU hits 0.700 instead of 0.200", "PPL is 100.0 instead of 100.0", "40 instead of 40 on `disk`."):
        assert sentence in text.replace("\n", " ")
    assert_readable(text, 1500)


def test_no_published_number_is_unmarked(tree):
    """Every number of the reference becomes one that nothing else can be, and is then looked for outside the marks."""
    before, kept = page("dwr"), (("training_curve", "epoch"), ("gate_norms", "layer"))  # by which rows are joined

    def change(data):
        made = strange(data["dwr"])
        for table, key in kept:
            for row, own in zip(made[table]["rows"], data["dwr"][table]["rows"], strict=True):
                row[key] = own[key]
        data["dwr"] = made

    edit_yaml(PUBLISHED, change)
    text = page("dwr")
    assert len(STRANGE.findall(text)) > 75  # they are all there
    assert not STRANGE.findall(unmarked(text))
    assert unmarked(text) == unmarked(before)


def overfit(before: dict, last: dict) -> None:
    before.update(validation_loss=5.0, train_loss=4.0)
    last.update(validation_loss=5.5, train_loss=3.5)


def flatter(_, last: dict) -> None:
    """Spreads of 0.3 in layer 0, and 0.2 in layer 1."""
    for layer in (0, 1):
        least = last[f"validation_gate_norm_min_layer{layer}"]
        last[f"validation_gate_norm_max_layer{layer}"] = least + 0.3 - layer / 10


CHANGES = {
    "It overfits with some seeds": ("dwr", "With 1 of 3 seeds.", lambda: edit_seeds(overfit, ("seed_1",))),
    "With all": ("dwr", "Yes, with every seed.", lambda: edit_seeds(overfit)),
    "A rise": ("dwr", "rose by at most 1.5000", lambda: edit_seeds(
        lambda before, last: last.update(train_loss=before["train_loss"] + 1.5))),
    "Depth": ("dwr", "changes by -0.100 [-0.100, -0.100] from a layer", lambda: edit_seeds(flatter)),
    "Recommended": ("dwr", "**Recommended: `recipe`.** It reaches what was asked for",
                    lambda: write_locality(read_record(REFERENCE)["run"])),
    "Not recommended": ("dwr", "**The `recipe` misses the goal**",
                        lambda: write_locality(read_record(REFERENCE)["run"], smallest_load=0.2)),
    "A failed check": ("dwr_summary", "logits are equal to the bit in every cell",
                       lambda: set_key(CACHE, "checks.logits_are_equal_to_the_bit_in_every_cell", "odd")),
    "Capacity": ("dwr", "| Expert capacity factor | 1.25 |",
                 lambda: set_key(RUN_JSON, "identity.dwr.capacity_factor", 1.25)),
    "A slow precision": ("dwr", "| Precision | fp64 |", lambda: set_key(TRAINING, "precision", "fp64")),
    "A dataset": ("dwr", "`docs` is the dataset `some/set`, configuration `part-7`, revision `abc123`.",
                  lambda: write_json(SOURCE, {"path": "some/set", "name": "part-7", "revision": "abc123"})),
    "Files": ("dwr", "`docs` is 1 local file of 1.50 KiB.",
              lambda: write_json(SOURCE, {"files": {"a": {"bytes": 1536}}})),
    "Inexact": ("cached_inference", "**Not shown.** These checks failed: logits are equal to the bit in every cell.",
                lambda: set_key(CACHE, "checks.logits_are_equal_to_the_bit_in_every_cell", False)),
    "No gap": ("cached_inference", "(section 2). - **Does prefetching help?**",
               lambda: edit_csv(HITS, lambda hits: hits.assign(hit_rate=0.5))),
    "Prefetching helps": ("cached_inference", "faster on 6, and nowhere slower than 1.000", lambda: edit_csv(
        SPEEDS, lambda speeds: speeds.assign(ratio_to_resident=0.5 + 0.1 * (speeds["prefetch"] == "gate")))),
    "No limit": ("cached_inference", "**No limit was enforced**",
                 lambda: (write_peers(), set_key(PEERS, "limited", False))),
    "Memory": ("measured", "Check, memory is bounded: ✗ **failed**.",
               lambda: set_key(TIMED, "checks.memory_is_bounded", False)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_rule_has_a_sentence_for_each_outcome(tree, name):
    where, sentence, change = CHANGES[name]
    add_runs()
    assert sentence not in page(where).replace("\n", " ")
    change()
    assert sentence in page(where).replace("\n", " ")


@pytest.mark.parametrize("name", FROM)
def test_an_input_that_is_missing_or_damaged_is_named(tree, name):
    write_peers()
    for path in FROM[name]:
        content = path.read_bytes()
        path.write_bytes(b"[")
        with pytest.raises(DynarouteError, match=rf"^{re.escape(str(path))}[:,] [^\n]*$"):
            page(name)
        path.unlink()
        if path in (PEERS, MOE):
            assert "Not measured" in page(name)
        else:
            with pytest.raises(DynarouteError, match=rf"^{re.escape(str(path))}[:,] [^\n]*$"):
                page(name)
        path.write_bytes(content)


def test_the_summary_holds_the_numbers_of_both_systems(finished):
    reports = finished.root / "reports"
    found = json.loads((reports / "summary.json").read_text())
    training = read_record(finished.root / TRAINING)
    assert found["dwr"]["validation_loss"] == training["best_validation_loss"]
    assert found["dwr"]["hit_rate_lru"] == read_record(finished.root / SIMULATION)["hit_rate"]["lru"]
    for name in ("measured", "summary"):
        for system in ("dwr", "dagformer"):
            part = (finished.root / f"data/{system}/report/{name}.md").read_text("utf-8")
            assert part.strip() in (reports / f"{name}.md").read_text("utf-8")


def test_figures_follow_what_they_show(tree):
    before = {path: path.read_bytes() for path in FIGURES}
    for path, column in ((CURVE, "validation_loss"), (ROUTER, "gate_norm"), (HITS, "hit_rate")):
        edit_csv(path, lambda table, column=column: table.__setitem__(column, table[column] * 0.9))
    add_runs()
    edit_seeds(overfit)
    edit_seeds(lambda _, last: last.update(validation_gate_norm_max_layer1=9.0))
    stage("plot_dwr").main(load_settings())
    assert not [path for path in FIGURES if path.read_bytes() == before[path]]
    before = FIGURES[-1].read_bytes()
    write_locality(read_record(REFERENCE)["run"])
    stage("plot_dwr").main(load_settings())
    assert FIGURES[-1].read_bytes() != before


def test_a_model_of_one_layer_and_a_single_validation_has_a_page_and_figures(tree):
    edit_csv(ROUTER, lambda router: router[router["layer"] == 0])
    edit_csv(CURVE, lambda curve: curve.iloc[[0, -1]])
    for name in ("plot_dwr", "report_dwr", "report_cached_inference"):
        stage(name).main(load_settings())
