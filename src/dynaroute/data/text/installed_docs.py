"""Docstrings of installed Python packages by static parsing: English text that needs no network.

Nothing that is read is imported or run, so a package may be broken, heavy or for another platform.
"""

import ast
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from dynaroute.errors import DynarouteError

PARAGRAPH = 60  # characters: shorter ones, such as headings and lines of examples, may repeat
# Tests document nothing, and what lies in the other folders is not the package's own.
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"),
    *("vendor", "vendored", "_vendor", "_bundled", "extern", "externals"),
}


def version(package: str) -> str:
    """The installed version of a package, without a local tag such as `+cpu`: that tag does not change its text.

    Raises:
        DynarouteError: the package is not installed.
    """
    if package == "python":
        return platform.python_version()
    try:
        found = importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        distributions = importlib.metadata.packages_distributions().get(package)  # such as yaml of PyYAML
        if not distributions:
            raise DynarouteError(f"packages: {package!r} is not an installed package that can be imported") from None
        found = importlib.metadata.version(distributions[0])
    return found.partition("+")[0]


def modules(packages: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (package, id, text) of every documented module, by package as given and then sorted by path.

    The id is the module's path from the package on, such as "numpy/linalg/_linalg.py". The text is its docstrings in
    source order, cleaned of indentation, with blank lines between. A docstring that repeats an earlier one word for
    word is left out, and so is a paragraph of more than PARAGRAPH characters: classes inherit docstrings, and what
    stands in several modules would be both trained on and held out. Files that do not parse are skipped.

    Raises:
        DynarouteError: a package is not installed.
    """
    seen: set[str] = set()
    paragraphs: set[str] = set()
    for package in packages:
        for module_id, path in sorted(_source_files(package)):
            docstrings = [docstring for docstring in dict.fromkeys(_docstrings(_parse(path))) if docstring not in seen]
            seen.update(docstrings)
            new = [text for docstring in docstrings if (text := _new_paragraphs(docstring, paragraphs))]
            if new:
                yield package, module_id, "\n\n".join(new)


def _new_paragraphs(docstring: str, seen: set[str]) -> str:
    """A docstring without the paragraphs that were seen before, but for short ones; what is new is noted."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        words = paragraph.strip()
        if len(words) <= PARAGRAPH or words not in seen:
            kept.append(paragraph)
            seen.add(words)
    return "\n\n".join(kept)


def _source_files(package: str) -> Iterator[tuple[str, Path]]:
    for root in _roots(package):
        if root.is_file():
            yield root.name, root
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for name in names:
                path = Path(folder, name)
                if path.suffix == ".py":
                    yield f"{package}/{path.relative_to(root).as_posix()}", path


def _roots(package: str) -> list[Path]:
    """Where the source lies: folders, or the one file of a module that is not a package."""
    if package == "python":
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package) if package.isidentifier() else None  # "a.b" would import a
    if spec is None:
        raise DynarouteError(f"packages: {package!r} is not an installed package that can be imported")
    return [Path(place) for place in spec.submodule_search_locations or [spec.origin]]


def _parse(path: Path) -> ast.AST:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes and the like in the source that is read
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # what can hold a definition
            yield from _docstrings(child)
