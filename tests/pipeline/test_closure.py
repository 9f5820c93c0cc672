"""What `locate` writes of every script is its import closure, and every stage depends on that of its script."""

import ast
import re
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports
from repository import REPOSITORY

from dynaroute.config import read_yaml
from dynaroute.pipeline import closure
from dynaroute.pipeline.closure import EXEMPT, closures

FILES = ("dvc.yaml", "benchmarks/dvc.yaml")
STAGES = [
    (name, stage)
    for file in FILES
    for name, stage in ((name, own.get("do", own)) for name, own in read_yaml(REPOSITORY / file)["stages"].items())
    if "always_changed" not in stage
]
SCRIPTS = sorted({REPOSITORY / stage["cmd"].split()[2].removeprefix("../") for _, stage in STAGES})


def is_exempt(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in EXEMPT)


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("dynaroute", exclude_type_checking_imports=True, cache_dir=None)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    return closures(SCRIPTS, tmp_path_factory.mktemp("notes") / "trees.json")


def imported_by(script: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a script, or one beside it that it imports, imports itself."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & modules or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    beside = [script.parent / f"{name}.py" for name in names]
    return (names & modules).union(*(imported_by(path, modules) for path in beside if path.is_file()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_scripts_closure_is_the_one_that_grimp_finds(script, graph, found):
    expected, waiting = set(), imported_by(script, graph.modules)
    while waiting:
        module = waiting.pop()
        if not is_exempt(module) and module not in expected:
            expected.add(module)
            waiting |= graph.find_modules_directly_imported_by(module) | {module.rpartition(".")[0] or module}
    assert {name for name in found[script.stem] if name in graph.modules} - {"dynaroute"} == expected - {"dynaroute"}


def test_every_exempt_module_exists(graph):
    assert set(EXEMPT) <= graph.modules


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_stage_depends_on_the_code_of_its_script_and_on_no_other(name, stage):
    """Besides, only what computes the knobs of variants and runs depends on config."""
    is_code = re.compile(r"(\.\./)*(src|stages|benchmarks|data/inputs/code)/(?!.*templates/)").match
    code = list(filter(is_code, stage["deps"]))
    config = [path for path in code if "dynaroute/config" in path]
    assert code == [f"data/inputs/code/{Path(stage['cmd'].split()[2]).stem}.json", *config]
    assert bool(config) == (name in ("resolve_variants", "benchmark_dagformer_step"))


def test_every_template_is_a_dependency():
    read = {Path(path).name for _, stage in STAGES for path in stage["deps"] if "templates/" in path}
    assert read == {path.name for path in REPOSITORY.glob("src/dynaroute/reporting/templates/*")}


def test_imports_point_one_way(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert lint_imports(no_cache=True, no_logo=True) == 0


# --- a small project ---------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    files = {
        "stages/train.py": "from lib.loop import run\n\nrun()\n",
        "stages/plot.py": "import lib.figures\n",
        "src/lib/__init__.py": "",
        "src/lib/loop.py": "def run():\n    from lib import model\n\n    return model.SIZE\n",
        "src/lib/model.py": """'A model.'

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lib.figures

SIZE = 3
""",
        "src/lib/figures.py": "import lib.machine\n",
        "src/lib/machine.py": "CORES = 2\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(closure, "SOURCES", tmp_path / "src")
    monkeypatch.setattr(closure, "EXEMPT", {"lib.machine": "because"})
    return tmp_path


def read(project: Path) -> dict[str, dict[str, str]]:
    return closures(project.glob("stages/*.py"), project / "trees.json")


def test_closures_follow_imports_in_functions_but_none_for_type_checking_nor_of_exempt_modules(project):
    assert {name: list(modules) for name, modules in read(project).items()} == {
        "plot": ["lib", "lib.figures", "stages/plot.py"],
        "train": ["lib", "lib.loop", "lib.model", "stages/train.py"],
    }


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("A model.", "Another docstring.", set()),
        ("SIZE = 3", "SIZE = (3)  # windows", set()),
        ("SIZE = 3", "\n\n\nSIZE = \\\n    3", set()),
        ("SIZE = 3", "SIZE = 4", {"train"}),
        ("import lib.figures", "import lib.machine", {"train"}),  # it need not, but nothing is missed
        ("SIZE = 3", "SIZE = ", {"train"}),  # which Python explains when the stage runs
    ],
)
def test_what_changes_a_syntax_tree_and_nothing_else_changes_the_closures_with_that_module(project, old, new, changed):
    before = read(project)
    path = project / "src/lib/model.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = read(project)
    assert {name for name in after if after[name] != before[name]} == changed


def test_trees_that_were_read_are_not_read_again_unless_a_kill_cut_the_notes_off(project, monkeypatch):
    before = read(project)
    notes = (project / "trees.json").read_text()
    (project / "trees.json").write_text(notes[:100])
    assert read(project) == before
    assert (project / "trees.json").read_text() == notes
    monkeypatch.setattr(closure, "_read_tree", lambda source: pytest.fail("read again"))
    assert read(project) == before
