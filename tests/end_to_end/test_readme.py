"""The README keeps its word: its numbers are those of the committed reports, and its commands and examples run."""

import re
import shutil

import pytest
from repository import REPOSITORY
from ruamel.yaml import YAML
from tiny_pipeline import LOCATE, VARIANTS, ran

from dynaroute.config import read_yaml

README = (REPOSITORY / "README.md").read_text("utf-8")
# They make the environment, test, or need a GPU or the hub.
ELSEWHERE = re.compile(r"make (repro|test|smoke|scale)|--model")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    text = "".join(blocks("sh")).replace("\\\n", "").replace("--cache 11", "--cache 3")  # of 8 experts, not of 32
    lines = text.splitlines()
    return [line.partition(" #")[0].strip() for line in lines if not ELSEWHERE.search(line)]


@pytest.mark.parametrize(
    ("lines", "page"), [(r"^\| .*\]\(reports/.*$", "summary"), (r"most memory: [\d.]+ MiB", "measured")]
)
def test_the_numbers_of_the_readme_are_those_of_the_reports(lines, page):
    found = re.findall(r"[+-]?\d+(?:\.\d+)?", " ".join(re.findall(lines, README, re.MULTILINE)).replace("P1", ""))
    reported = set(re.findall(r"[+-]?\d+(?:\.\d+)?", (REPOSITORY / f"reports/{page}.md").read_text("utf-8")))
    assert found
    assert [number for number in found if number not in reported] == []


def test_the_commands_of_the_readme_run_and_its_experiment_retrains_the_variants_that_inherit_its_knob(
    finished, tmp_path
):
    workspace = finished.copy(tmp_path / "readme")
    expected = read_yaml(workspace.root / "params.yaml")
    output = {command: workspace.run("sh", "-c", command).stdout for command in commands()}
    # J1 has its own.
    inherits = [f"{stage}@{name}" for stage in ("train_dagformer", "evaluate_nll") for name in VARIANTS if name != "J1"]
    collected = {LOCATE, "resolve_variants", "compare_variants", "plot_dagformer", "report_dagformer", "summarize"}
    collected |= {"analyze_topology@P1", "analyze_planted"}
    assert ran(output["dvc exp run -S tau_final=0.05"]) == collected.union(inherits)
    shown = [line.split() for line in output["dvc params diff"].splitlines() if line]
    assert shown[1:] == [["params.yaml", "tau_final", str(expected["tau_final"]), "0.05"]]
    assert "benchmarks" not in workspace.run("dvc", "metrics", "show").stdout
    assert read_yaml(workspace.root / "params.yaml") == expected | {"tau_final": 0.05}


@pytest.mark.parametrize("example", blocks("python"))
def test_an_example_of_the_readme_runs(finished, example):
    finished.run("python", "-c", example)


def test_the_text_of_your_own_of_the_readme_is_tokenized(finished, tmp_path):
    workspace = finished.copy(tmp_path / "own")
    texts = workspace.root / "inputs/mine"
    for number, path in enumerate(sorted(REPOSITORY.glob("src/dynaroute/*/*.py"))):
        (texts / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, texts / path.parent.name / f"{number}.txt")
    params = read_yaml(workspace.root / "params.yaml")
    (entry,) = (block for block in blocks("yaml") if block.startswith("corpora:"))
    params["corpora"] |= YAML(typ="safe").load(entry)["corpora"]
    YAML(typ="safe").dump(params, workspace.root / "params.yaml")
    workspace.run("dvc", "repro", "tokenize@mine")
    assert (workspace.root / "data/tokens/mine/metadata.json").is_file()
