"""Finds the code that computes a stage's result: its script and all modules it imports, also within functions.

Modules are compared by their syntax trees, so comments, docstrings and layout do not matter. Imports are read from the
trees too: no module is imported, and `if TYPE_CHECKING:` does not count.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.hashes import read_notes

SOURCES = Path(__file__).parents[2]
OWN_SOURCE = Path(__file__).read_bytes()
# Modules and packages that change no result: they and their imports are part of no closure.
EXEMPT = {
    "dynaroute.config": "passes on params.yaml, of which `params` in dvc.yaml lists what each stage uses",
    "dynaroute.data.locate": "finds out what stages depend on, not what they compute",
    "dynaroute.errors": "the type of the errors that end a stage with one line",
    "dynaroute.pipeline.closure": "finds out what stages depend on",
    "dynaroute.pipeline.environment": "refuses to run",
    "dynaroute.pipeline.hashes": "finds out what stages depend on",
    "dynaroute.pipeline.launcher": "starts processes",
    "dynaroute.pipeline.scratch": "locks and resuming",
    "dynaroute.pipeline.stage": "the command line, and errors in one line",
    "dynaroute.pipeline.terminal": "how a program ends",
}


def closures(scripts: Iterable[Path], notes: Path) -> dict[str, dict[str, str]]:
    """For each script name, the hash of its syntax tree and of each module in its import closure.

    Args:
        scripts: below the repository's root, with unique names.
        notes: a file that caches the trees for the next call.
    """
    known, trees = read_notes(notes), {}

    @functools.cache
    def tree(path: Path) -> dict[str, Any]:
        source = path.read_bytes()
        key = hashlib.sha256(OWN_SOURCE + source).hexdigest()
        trees[key] = known.get(key) or _read_tree(source)
        return trees[key]

    def closure(script: Path) -> dict[str, str]:
        found, waiting = {}, [(script.relative_to(SOURCES.parent).as_posix(), script)]
        while waiting:
            name, path = waiting.pop()
            if name not in found and not any(f"{name}.".startswith(f"{exempt}.") for exempt in EXEMPT):
                found[name] = tree(path)["hash"]
                waiting += [module for name in tree(path)["imports"] for module in _modules(name, script.parent)]
        return dict(sorted(found.items()))

    found = {script.stem: closure(script) for script in sorted(scripts)}
    if trees != known:
        write_json(notes, trees)
    return found


def _read_tree(source: bytes) -> dict[str, Any]:
    """The hash of a module's syntax tree, and the dotted names it imports, whose last part may not be a module."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # Python reports it when a stage imports the module
        return {"hash": hashlib.sha256(source).hexdigest(), "imports": []}
    imports = sorted(set(_imports(tree)))
    return {"hash": hashlib.sha256(json.dumps(_structure(tree)).encode()).hexdigest(), "imports": imports}


def _imports(tree: ast.AST) -> Iterator[str]:
    match tree:
        case ast.Import():
            yield from (alias.name for alias in tree.names)
        case ast.ImportFrom():
            yield from (f"{tree.module}.{alias.name}" for alias in tree.names)
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            pass
        case _:
            for node in ast.iter_child_nodes(tree):
                yield from _imports(node)


def _structure(node: Any) -> Any:
    """A syntax tree as JSON, without docstrings, and without empty fields, which differ between Python versions."""
    if isinstance(node, list):
        return [_structure(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name in node._fields if (value := getattr(node, name, None)) not in (None, [])}
    match node:
        case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    fields["body"] = rest
    return [type(node).__name__, {name: _structure(value) for name, value in fields.items()}]


@functools.cache
def _modules(name: str, folder: Path) -> list[tuple[str, Path]]:
    """The modules of this repository that importing `name` runs, packages above it included.

    Looks into the script's own folder first and then into src, as Python does.
    """
    package = name.rpartition(".")[0]
    above = _modules(package, folder) if package else []
    if package and not above:  # another project's
        return []
    stem = name.replace(".", "/")
    places = [root / f"{stem}{suffix}" for root in (folder, SOURCES) for suffix in (".py", "/__init__.py")]
    return above + [(name, place) for place in places if place.is_file()][:1]
