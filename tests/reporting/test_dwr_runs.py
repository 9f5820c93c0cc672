"""The page on DWR runs says what the runs found, and judges by the rules that it states."""

import json
import re
from pathlib import Path

import pytest
from dwr_tree import edit_json
from report_checks import hashes
from repository import REPOSITORY

from dynaroute.config import Settings, read_yaml
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.reporting.dwr_runs import page, plot_runs, read_runs, sweep

RUNS = {
    "more_text": ({"train_windows": 640, "training": {"epochs": 2.5}}, 5.25, 0.25),
    "reference": ({}, 5.5, 0.3),
    "strong": ({"balance_coefficient": 0.5}, 5.625, 0.28),
    "none": ({"balance_coefficient": 0.0}, 5.5625, 0.45),
    "wide": ({"d_ff": 256, "dropout": 0.2}, 5.75, 0.31),
}  # overrides, test loss, hit rate


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    """In a working directory with the results of all runs."""
    monkeypatch.chdir(tmp_path)
    params = read_yaml(REPOSITORY / "params.yaml")
    windows = {"train_windows": 64, "validation_windows": 32, "eval_windows": None}
    reference = {**windows, "d_ff": 128, "balance_coefficient": 0.01, "training": {"epochs": 10.0}}
    params["dwr_runs"] = {name: {"corpus": "docs", **overrides} for name, (overrides, *_) in RUNS.items()}
    params["dwr_runs"]["reference"] |= reference
    settings = Settings.model_validate(params)
    for number, (name, (_, loss, rate)) in enumerate(RUNS.items()):
        record = {
            **{"name": name, "run": f"{number}", "settings": settings.dwr_run(name).model_dump()},
            **{"parameters": 870_560 + number, "training_tokens": 8_192, "epochs": 10.0, "best_epoch": 6.0 + number},
            **{
                "validation_loss": loss - 0.1,
                "test_loss": loss,
                "final_train_loss": 3.0,
                "final_validation_loss": loss,
            },
            **{"smallest_load": 0.25, "largest_load": 1.75, "experts": 32, "capacity": 11, "trace_tokens": 1_536},
            "hit_rate": {"lru": rate, "next_use": rate + 0.1, "min": rate + 0.3},
            "uniform_hit_rate": {"lru": 0.26, "next_use": 0.34, "min": 0.61},
        }
        write_json(f"reports/dwr_runs/{name}.json", record)
    return settings


def test_the_sweep_is_what_differs_in_the_balance_coefficient_alone_by_that(settings):
    runs = read_runs(settings)
    assert runs[0]["name"] == "reference"
    assert [run["name"] for run in sweep(runs)] == ["none", "reference", "strong"]


@pytest.mark.parametrize(
    "text",
    [
        "| `none` | 0 | 260.5 | 0.25–1.75 | 0.450 | 0.260 | 0.550 | 0.340 | 0.750 | 0.610 |",
        "LRU hits most with λ = 0: 0.450, against 0.300 of the reference, where it hits 0.260 of uniform routing; at a "
        "test perplexity of 260.5 against 244.7.",
        "No online policy can expect more of those than the share of experts held, 0.344.",
        "| `reference` | none | 870,561 | 3.000 | 5.500 | +2.500 | 5.400 (7) | 244.7 | 0.300 | 0.260 |",
        "| `more_text` | train_windows = 640, training.epochs = 2.5 | 870,560 | 3.000 | 5.250 | +2.250 |",
        "| `wide` | d_ff = 256, dropout = 0.2 |",
        "a lower test perplexity than the reference: `more_text`; a smaller gap at the end: `more_text`.",
        "870,561 parameters and reads 8,192 tokens of `docs` 10 times",
        "1,536 tokens of the test text, read one by one, at 11 of 32 experts",
    ],
)
def test_it_holds_the_numbers_of_the_files(settings, text):
    assert text in page(read_runs(settings))


def test_it_holds_no_placeholder_and_follows_its_files(settings):
    before = page(read_runs(settings))
    assert not re.search(r"\bnan\b|None|\{|\}|<class|\bTrue\b|\bFalse\b", before)
    edit_json("reports/dwr_runs/none.json", lambda run: run["hit_rate"].__setitem__("lru", 0.1))
    after = page(read_runs(settings))
    assert "No coefficient gives LRU more hits than that of the reference: 0.300, of uniform routing 0.260." in after
    edit_json("reports/dwr_runs/more_text.json", lambda run: run.__setitem__("test_loss", 5.6))
    assert "a lower test perplexity than the reference: none;" in page(read_runs(settings))


def test_the_figure_is_the_same_bytes_every_time_and_follows_the_runs(settings):
    plot_runs(sweep(read_runs(settings)), "one.png")
    plot_runs(sweep(read_runs(settings)), "two.png")
    edit_json("reports/dwr_runs/strong.json", lambda run: run.__setitem__("test_loss", 5.1))
    plot_runs(sweep(read_runs(settings)), "three.png")
    found = hashes("one.png", "two.png", "three.png")
    assert found["one.png"] == found["two.png"] != found["three.png"]


def test_results_that_are_missing_damaged_or_of_other_settings_are_named(settings):
    path = Path("reports/dwr_runs/wide.json")
    edit_json(path, lambda run: run["settings"].__setitem__("dropout", 0.3))
    with pytest.raises(DynarouteError, match=r"wide\.json: of other settings than dwr_runs\.wide: run dvc repro"):
        read_runs(settings)
    edit_json(path, lambda run: run.pop("settings"))
    with pytest.raises(DynarouteError, match=r"wide\.json: lacks 'settings'"):
        read_runs(settings)
    path.write_text(json.dumps([]))
    with pytest.raises(DynarouteError, match=r"wide\.json: must be a mapping"):
        read_runs(settings)
    path.unlink()
    with pytest.raises(DynarouteError, match=r"wide\.json: cannot be read"):
        read_runs(settings)
