"""The DWR report says what its inputs say: whatever number changes there, changes here."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from dwr_tree import EXPERTS, LAYERS, RUN, edit_csv, edit_json, edit_yaml
from report_checks import STRANGE, strange, table_rows, unmarked

from dynaroute.errors import DynarouteError
from dynaroute.reporting.dwr.report import page
from dynaroute.reporting.dwr.results import read_results
from dynaroute.reporting.dwr.routers import spread_sentence

pytestmark = pytest.mark.usefixtures("tree")

TRAINING = Path("reports/dwr/training.json")
CURVE = Path("reports/dwr/training.csv")
ROUTER = Path("reports/dwr/router.csv")
CACHE = Path("reports/dwr/cache.csv")
RUN_JSON = Path("data/dwr/train/run.json")
EXPORT = Path("reports/dwr/export.json")
CACHE_SUMMARY = Path("reports/dwr/cache.json")
SIMULATION = Path("reports/dwr/simulation.json")


def report() -> str:
    return page(read_results())


def section(text: str, title: str) -> str:
    return re.split(r"^##+ ", text.split(title, 1)[1], flags=re.MULTILINE)[0]


def test_the_same_inputs_give_the_same_bytes():
    assert report() == report()


def test_it_names_its_run_and_has_every_section():
    text = report()
    assert RUN in text.split("##")[0]
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [title.split(". ")[0] for title in titles] == ["At a glance", *map(str, range(1, 9))]


def test_it_holds_no_placeholder():
    assert not re.search(r"nan|None|\{|\}|<class|\bTrue\b|\bFalse\b", report())


def test_figures_are_linked_relative_to_the_report():
    links = re.findall(r"!\[.*\]\((.*)\)", report())
    assert links
    assert all(re.fullmatch(r"figures/dwr_\w+\.png", link) for link in links)


# --- every number comes from the inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["validation_loss", "train_loss", "lr", "tokens", "step", "epoch"])
def test_the_training_curve_is_that_of_the_file(column):
    before = report()
    edit_csv(CURVE, lambda curve: curve.__setitem__(column, curve[column] * 1.5))
    assert section(report(), "2. Training curve") != section(before, "2. Training curve")


def test_every_expert_norm_and_load_counts():
    edit_csv(ROUTER, lambda router: router.__setitem__("gate_norm", router["gate_norm"] + 1))
    rows = table_rows(section(report(), "3.3"))
    assert rows[2] == ["0", "1.500", "1.530", "1.515", "0.030", "1.00", "1.00"]


def test_balance_loss_is_given_in_both_forms():
    rows = table_rows(section(report(), "**Balance loss**"))
    assert rows[2] == ["0", "1.0100", "2.0200", "2.0200", "2.0200"]
    assert rows[4][1:3] == ["1.0300", "2.0600"]


@pytest.mark.parametrize("key", ["parameters", "active_parameters", "steps", "steps_planned"])
def test_sizes_are_those_of_the_summary(key):
    edit_json(TRAINING, lambda data: data.__setitem__(key, 987_654))
    assert "987,654" in section(report(), "1. Training configuration")


def test_sizes_of_files_are_measured_on_them():
    Path("data/dwr/train/best.safetensors").write_bytes(bytes(777 * 1024))
    edit_json(EXPORT, lambda data: data.__setitem__("backbone_file_bytes", 555 * 1024))
    text = report()
    assert "777.00 KiB" in section(text, "4. Checkpoint inventory")
    assert "555.00 KiB" in section(text, "3.4")
    assert f"| expert files | {LAYERS * EXPERTS} |" in text


def test_hit_rates_are_those_of_the_file():
    edit_csv(CACHE, lambda cache: cache.__setitem__("decode_hit_rate", 0.4321))
    text = section(report(), "6. Cached inference")
    assert ["4", "0.333", "`lru`", "0.432", "0.100", "96", "146.84 KiB"] in table_rows(text)
    assert "5 prompts of 9 tokens from the test split, each with the 13 tokens that follow it there" in text


def test_hit_rates_are_set_against_what_the_same_policy_hits_of_uniform_routing():
    sentence = (
        "With 4 of 12 experts held, the hit rate of 2,345 tokens of the test text, replayed one by one, is 0.301 with "
        "`lru` (0.200), 0.422 with `next_use` (0.320); in parentheses that of the same policy if routing is uniform"
    )
    assert sentence in section(report(), "At a glance")
    assert sentence in section(report(), "6. Cached inference")
    edit_json(SIMULATION, lambda data: data["uniform_hit_rate"].__setitem__("lru", 0.1234))
    assert "0.301 with `lru` (0.123)" in report()


def test_settings_are_those_of_the_run_and_not_of_params_yaml():
    Path("params.yaml").unlink()
    edit_json(RUN_JSON, lambda data: data["identity"]["dwr"]["training"].__setitem__("warmup_steps", 4321))
    assert ["Warm-up steps", "4,321", "200"] in table_rows(report())


def test_settings_that_differ_from_the_published_ones_are_named():
    text = section(report(), "1. Training configuration")
    named = re.search(r"Settings that differ from the published run: (.*)\.", text).group(1).split(", ")
    assert "layers" in named
    assert "top_k" not in named
    assert "batch (sequences)" not in named


def test_packages_and_tokens_of_the_corpus():
    text = section(report(), "7. Corpus")
    assert ["numpy", "2.4.66", "60,001", "60,001", "60,001"] in table_rows(text)
    assert ["train", "57", "400,123", "100,003", "6.2500"] in table_rows(text)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        (
            {"path": "some/set", "name": "part-7", "revision": "abc123", "files": {}},
            "some/set, part-7, revision abc123",
        ),
        ({"files": {"a.txt": {"bytes": 1536, "mtime_ns": 1}}}, "1 local file, 1.50 KiB"),
    ],
)
def test_other_kinds_of_corpus(place, shown):
    Path("data/raw/docs.source.json").write_text(json.dumps(place))
    text = report()
    assert shown in section(text, "7. Corpus")
    assert "installed packages say" not in text


# --- rules have a sentence for each outcome -----------------------------------------------------------------------


def validation_losses(*values: float) -> None:
    edit_csv(CURVE, lambda curve: curve.__setitem__("validation_loss", values))


def test_a_run_that_does_not_overfit():
    assert "No overfitting in this run: the last validation loss is the lowest." in report()


def test_a_run_that_overfits():
    validation_losses(5.8, 4.5, 4.0, 4.25)
    text = report()
    assert "It overfits: after step 200 validation loss rose by 0.2500 nats" in section(text, "3.2")
    assert ["best validation", "200", "4.1123", "4.0000", "-0.1123"] in table_rows(text)
    assert "Validation loss turned." in section(text, "8. Known limitations")


def test_a_rise_that_counts_as_level():
    validation_losses(5.8, 4.5, 4.0, 4.005)
    assert "ended 0.0050 nats above its best of step 200, which counts as level" in report()


def test_a_rise_without_falling_training_loss():
    validation_losses(5.8, 4.5, 4.0, 4.25)
    edit_csv(CURVE, lambda curve: curve.__setitem__("train_loss", [None, 5.0, 4.1, 4.2]))
    assert "instability, not overfitting" in report()


def test_an_untrained_model_is_the_best():
    validation_losses(5.8, 6.5, 7.0, 7.25)
    assert "after step 0 validation loss rose by 1.4500 nats" in report()


@pytest.mark.parametrize(("entropy", "words"), [(6.0, "1.9677 nats below"), (3.0, "1.0323 nats above (not below)")])
def test_the_unigram_entropy_may_be_on_either_side(entropy, words):
    edit_json(TRAINING, lambda data: data.__setitem__("validation_unigram_entropy", entropy))
    text = report()
    assert words in section(text, "At a glance")
    assert words in section(text, "3.1")


def test_training_loss_that_rises_is_said_to():
    edit_csv(CURVE, lambda curve: curve.__setitem__("train_loss", [None, 4.0, 3.0, 3.5]))
    assert "(it rose in 1 of 2 comparisons)" in report()
    edit_csv(CURVE, lambda curve: curve.__setitem__("train_loss", [None, 4.0, 3.0, 4.5]))
    assert "did not fall" in report()


def test_one_comparison_of_training_losses_is_not_said_to_be_many():
    CURVE.write_text("".join(line for line in CURVE.open() if not line.startswith("200,")))
    assert "(two values, and so one comparison)" in report()
    assert "every interval" not in report()


def test_stability_is_what_the_curve_recorded():
    assert "no loss rose by more than 0.5 nats from one row to the next" in report()
    edit_csv(CURVE, lambda curve: curve.__setitem__("train_gradient_norm", [None, 0.777, 3.1416, 1.0]))
    assert "was between 0.777 and 3.142." in report()
    edit_csv(CURVE, lambda curve: curve.__setitem__("train_loss", [None, 4.0, 3.0, 4.25]))
    assert "training loss rose by up to 1.2500 nats from one row to the next" in report()


def spreads(*values: float) -> None:
    def change(router):
        router["gate_norm"] = [
            1 + values[layer] * (expert == 0) for layer in range(LAYERS) for expert in range(EXPERTS)
        ]

    edit_csv(ROUTER, change)


def test_three_layers_are_too_few_for_a_trend():
    spreads(0.1, 0.2, 0.3)
    assert "shows no clear trend with depth: rank correlation with the layer +1.00 over 3 layers" in report()
    assert "with so few layers, no order could pass" in report()


@pytest.mark.parametrize(
    ("spreads", "words"),
    [
        (
            [0.1, 0.2, 0.3, 0.4, 0.5],
            "The spread of gate norms grows with depth: rank correlation with the layer +1.00 over 5 layers, "
            "two-sided p = 0.017. It",
        ),
        (
            [0.5, 0.4, 0.3, 0.2, 0.1],
            "The spread of gate norms shrinks with depth: rank correlation with the layer -1.00 over 5 layers, "
            "two-sided p = 0.017. It",
        ),
        (
            [0.2, 0.1, 0.3, 0.4, 0.5],
            "The spread of gate norms shows no clear trend with depth: rank correlation with the layer +0.90 over 5 "
            "layers, two-sided p = 0.083. It",
        ),
    ],
)
def test_a_trend_has_its_sentence(spreads, words):
    rows = [(layer, norm) for layer, spread in enumerate(spreads) for norm in (1, 1 + spread)]
    router = pd.DataFrame(rows, columns=["layer", "gate_norm"])
    assert spread_sentence(router).startswith(words)
    assert f"largest in layer {spreads.index(max(spreads))} ({max(spreads):.3f})" in spread_sentence(router)


def test_equal_spreads_have_no_trend():
    spreads(0.0, 0.0, 0.0)
    assert "cannot have a trend" in report()


def test_no_collapsed_expert():
    assert "No expert has collapsed: the least used (layer 2, expert 0) has 0.40 of the uniform load." in report()


def test_collapsed_experts_are_named():
    def change(router):
        router.loc[router["layer"] == 1, "load"] = [0.02, 0.5, 0.48, 0.0]

    edit_csv(ROUTER, change)
    assert "2 of 12 experts collapsed: layer 1 expert 0 (0.08), layer 1 expert 3 (0.00)" in report()


def test_a_failed_check_is_shown_as_failed():
    edit_json(TRAINING, lambda data: data["checks"].__setitem__("gradient_reaches_every_router", False))
    text = report()
    assert ["✗ **failed**", "gradient reaches every router", "`train_dwr`"] in table_rows(text)
    assert "3 of 4 checks" in text


def test_a_check_is_as_good_as_its_value():
    edit_json(TRAINING, lambda data: data.__setitem__("checks", {"new_check": True, "odd_check": "yes", "no": None}))
    rows = table_rows(section(report(), "5. Validated properties"))
    assert ["✓", "new check", "`train_dwr`"] in rows
    assert ["✗ **failed**", "odd check", "`train_dwr`"] in rows
    assert ["not measured", "no", "`train_dwr`"] in rows
    assert not any("gradient" in row[1] for row in rows)


def test_inexact_logits_are_reported_as_such():
    assert "The benchmark checked that logits are equal in every cell." in report()
    edit_json(CACHE_SUMMARY, lambda data: data["checks"].__setitem__("logits_are_equal_in_every_cell", False))
    text = section(report(), "6. Cached inference")
    assert "**Not exact**: failed in the benchmark: logits are equal in every cell." in text


def test_capacity_and_early_stopping_are_reported_as_set():
    text = report()
    assert "no token loses an expert" in text
    assert "this run did not need it" in text
    edit_json(RUN_JSON, lambda data: data["identity"]["dwr"].__setitem__("capacity_factor", 1.25))
    edit_csv(CURVE, lambda curve: curve.__setitem__("train_dropped_share", 0.0321))
    edit_json(TRAINING, lambda data: data.__setitem__("stopped_early", True))
    text = report()
    assert "a factor of 1.25; 3.21% of assignments were dropped" in text
    assert "it ended this run" in text
    edit_json(RUN_JSON, lambda data: data["identity"]["dwr"]["training"].__setitem__("early_stopping_patience", None))
    assert "**Early stopping**: off" in report()


def test_a_precision_that_was_asked_for_but_not_used():
    edit_json(RUN_JSON, lambda data: data["identity"]["dwr"]["training"].__setitem__("precision", "bf16"))
    assert "fp32 (bf16 is set, but would be slow on that device)" in report()
    edit_json(TRAINING, lambda data: data.__setitem__("precision", "bf16"))
    assert ["Precision", "bf16", "bf16"] in table_rows(report())


def test_a_long_curve_is_thinned_and_says_so():
    curve = pd.read_csv(CURVE)
    long = pd.concat([curve.iloc[[0]], *[curve.iloc[[1]]] * 99, curve.iloc[[3]]], ignore_index=True)
    long["step"] = range(0, 1010, 10)
    long.loc[57, "validation_loss"] = 3.0
    long.to_csv(CURVE, index=False)
    text = section(report(), "2. Training curve")
    rows = table_rows(text)[2:]
    assert len(rows) <= 24
    assert {"0", "570", "1,000"} <= {row[0] for row in rows}
    assert f"{101 - len(rows)} of 101 validations are left out" in text


def test_a_single_validation():
    edit_csv(CURVE, lambda curve: curve.drop(index=[1, 2]))
    text = report()
    assert "the mean over all steps up to the only validation" in text


# --- what is published is marked ----------------------------------------------------------------------------------


def test_no_published_number_is_unmarked():
    """Every number of the reference becomes one that nothing else can be, and is then looked for outside the marks."""

    before = report()
    edit_yaml("reports/reference.yaml", lambda data: data.__setitem__("dwr", strange(data["dwr"])))
    text = report()
    assert len(STRANGE.findall(text)) > 80  # they are all there
    assert not STRANGE.findall(unmarked(text))
    without_difference = re.compile("Settings that differ.*|No setting differs.*")
    assert without_difference.sub("", unmarked(text)) == without_difference.sub("", unmarked(before))


# --- inputs that are missing, damaged or of another run -----------------------------------------------------------

INPUTS = [
    *(TRAINING, CURVE, ROUTER, CACHE, RUN_JSON, EXPORT, CACHE_SUMMARY, SIMULATION),
    Path("reports/reference.yaml"),
    *map(Path, ("data/tokens/docs/metadata.json", "data/raw/docs.source.json")),
    *(Path(f"data/dwr/train/{name}.safetensors") for name in ("best", "last")),
]


def refusal() -> str:
    with pytest.raises(DynarouteError) as caught:
        report()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", INPUTS, ids=str)
def test_a_missing_input_is_named(path):
    path.unlink()
    assert refusal().startswith(str(path))


@pytest.mark.parametrize("path", [path for path in INPUTS if path.suffix != ".safetensors"], ids=str)
@pytest.mark.parametrize("content", [b"", b"[", b"a: [1"])
def test_a_damaged_input_is_named(path, content):
    path.write_bytes(content)
    assert refusal().startswith(str(path))


@pytest.mark.parametrize("path", [TRAINING, EXPORT, CACHE_SUMMARY, SIMULATION])
def test_results_of_another_run_are_refused(path):
    edit_json(path, lambda data: data.__setitem__("run", "fedcba"))
    assert refusal() == f"{path}: belongs to run fedcba, not {RUN}: run dvc repro"


def test_tokens_of_another_run_are_refused():
    path = Path("data/tokens/docs/metadata.json")
    path.write_text(path.read_text() + "\n")
    assert refusal().startswith(f"{path}: not the tokens")


def test_a_missing_key_names_its_file():
    edit_json(TRAINING, lambda data: data.pop("test_loss"))
    assert refusal().startswith(f"{TRAINING}: lacks 'test_loss'")
