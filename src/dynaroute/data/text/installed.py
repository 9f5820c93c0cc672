"""Text from files of installed packages, by domain: real text of several kinds without a network.

No package is imported or run, so it may be broken, heavy or for another platform.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import re
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from dynaroute.config.data import Domain, InstalledText
from dynaroute.errors import DynarouteError

PAGE = 4000  # most characters of a document
SHORTEST = 500  # fewest characters of a document
RUN = 12  # consecutive words that, seen before, are a repetition


def version(package: str) -> str:
    """The installed version of a package, without a local tag such as `+cpu`, which does not change its text.

    Raises DynarouteError if the package is not installed.
    """
    try:
        found = importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        distributions = importlib.metadata.packages_distributions().get(package)  # such as yaml of PyYAML
        if not distributions:
            raise DynarouteError(f"paths: {package!r} is not an installed package that can be imported") from None
        found = importlib.metadata.version(distributions[0])
    return found.partition("+")[0]


def pages(source: InstalledText) -> Iterator[tuple[str, str, str]]:
    """Yields (domain, id, text) of documents: pages of files, until each domain has the characters asked for.

    Files come in the order of a hash of their names, and every file gives its first page before any gives its second.
    The id is the file's path from the package on and the page's number, such as "numpy/linalg/_linalg.py#1". Text that
    occurs in several files, such as licences and inherited docstrings, would be both trained on and held out. So lines
    whose words all lie in runs of RUN words seen before are dropped, and then pages that are too short.

    Raises:
        DynarouteError: a package is not installed, or a pattern matches no file of it.
    """
    found = {name: _matched_files(domain.paths) for name, domain in source.domains.items()}  # all, before any is read
    seen: set[int] = set()
    for name, domain in source.domains.items():
        files = sorted(found[name].items(), key=lambda file: hashlib.blake2b(file[0].encode()).digest())
        waiting = deque((file, _pages_of(path, domain)) for file, path in files)
        left = source.characters
        while waiting and left > 0:
            file, own = waiting.popleft()
            for number, page in itertools.islice(own, 1):
                waiting.append((file, own))
                text = _new_lines(page, seen)
                if len(text) >= SHORTEST:
                    yield name, f"{file}#{number}", text
                    left -= len(text)


def _matched_files(patterns: list[str]) -> dict[str, Path]:
    found = {}
    for pattern in patterns:
        package, _, rest = pattern.partition("/")
        if not rest:
            raise DynarouteError(f"paths: {pattern!r} must go on after the package, such as {package}/**/*.py")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None  # "a.b" would import a
        if spec is None or not spec.submodule_search_locations:
            raise DynarouteError(f"paths: {pattern!r} starts with {package!r}, which is not an installed package")
        try:
            files = [
                (f"{package}/{path.relative_to(root).as_posix()}", path)
                for root in spec.submodule_search_locations
                for path in Path(root).glob(rest)
                if path.is_file()
            ]
        except (OSError, ValueError, NotImplementedError) as error:  # above the package, absolute, or **.py
            raise DynarouteError(f"paths: {pattern!r} is not a usable pattern: {error}") from error
        if not files:
            raise DynarouteError(f"paths: {pattern!r} matches no file of {package}")
        found.update(files)
    return found


def _pages_of(path: Path, domain: Domain) -> Iterator[tuple[int, str]]:
    """Numbered pages of a file, cut at line ends; none if it is not UTF-8."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return
    if domain.read == "docstrings":
        text = "\n\n".join(_docstrings(_parse(text)))
    for number in itertools.count(1):
        if len(text) < SHORTEST:
            return
        end = PAGE if len(text) <= PAGE else text.rfind("\n", 0, PAGE) + 1 or PAGE
        yield number, text[:end]
        text = text[end:]


def _new_lines(text: str, seen: set[int]) -> str:
    """The text without lines that only repeat runs of words in `seen`, to which its own runs are added."""
    lines = text.splitlines()
    words_of = [re.findall(r"\w+", line.lower()) for line in lines]
    words = list(itertools.chain.from_iterable(words_of))
    repeated = [False] * len(words)
    for start in range(len(words) - RUN + 1):
        run = hash(tuple(words[start : start + RUN]))
        if run in seen:
            repeated[start : start + RUN] = [True] * RUN
        seen.add(run)
    old, kept, keep = iter(repeated), [], True
    for line, own in zip(lines, words_of, strict=True):
        if own:  # lines without words share the fate of the line before
            keep = not all([next(old) for _ in own])
        if keep:
            kept.append(line)
    return "\n".join(kept)


def _parse(text: str) -> ast.AST:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes and the like in the parsed source
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in source order, without indentation and code examples."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
        if docstring := "\n\n".join(paragraph for paragraph in paragraphs if ">>>" not in paragraph):
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # what can hold a definition
            yield from _docstrings(child)
