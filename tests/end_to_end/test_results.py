"""What a whole run of the pipeline leaves: every output, checks that hold, and the same bytes the next time."""

import csv
import json

from tiny_pipeline import VARIANTS


def test_the_pipeline_writes_every_output_and_its_checks_hold(finished):
    for path in finished.hashes():
        assert (finished.root / path).exists(), path
    # A few steps on a few windows need not show that much.
    learned = {"validation_loss_is_below_unigram_entropy", "removing_all_head_connections_raises_nll"}
    learned |= {"optimised_gates_are_better_on_their_own_window"}
    names = [f"data/dwr/{name}/summary" for name in ("train", "export", "cache", "simulation")]
    names += [f"data/dagformer/{name}" for name in ("base", "analysis/P1/topology", "sensitivity/summary")]
    names += [f"data/dagformer/{name}" for own in VARIANTS for name in (f"train/{own}/training", f"eval/{own}/nll")]
    for name in names:
        checks = json.loads((finished.root / f"{name}.json").read_text())["checks"]
        assert {check for check, holds in checks.items() if holds is False} <= learned, name  # null: not measured
    for name in ("dwr", "dagformer"):
        assert "| " in (finished.root / f"reports/{name}.md").read_text()
    for figure in (finished.root / "reports").glob("*/*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_variant_that_continues_another_starts_where_that_one_ended(finished):
    def curve(name):
        with (finished.root / f"data/dagformer/train/{name}/training.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    names = [f"validation_{name}" for name in ("nll_soft", "nll_hard", "nll_baseline", "mean_A", "tau", "lambda")]
    end, start = curve("P1")[-1], curve("P2")[0]
    assert [start[name] for name in names] == [end[name] for name in names]


def test_a_second_run_from_scratch_gives_the_same_hashes(finished, tmp_path):
    workspace = finished.copy(tmp_path / "again")
    workspace.run("dvc", "repro", "--force", "--no-run-cache")
    assert workspace.hashes() == finished.hashes()
