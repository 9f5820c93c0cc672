import importlib
import sys
from pathlib import Path

import pytest

from dynaroute.data.text import installed_docs
from dynaroute.errors import DynarouteError

MODULE = '''
"""What the module is for.

    An indented line.
The end.
"""

raise RuntimeError("this file must never run")


class First:
    """A class."""

    def method(self):
        """A method."""

        def inner():
            """Defined in a function."""


if True:

    async def second():
        """Defined under a condition."""

    def no_docstring():
        return """Not a docstring."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package, empty so far, that no other test has seen."""
    folder = tmp_path / "documented"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return folder


def test_docstrings_come_cleaned_and_in_source_order(package):
    (package / "deep").mkdir()
    (package / "deep" / "module.py").write_text(MODULE)
    text = (
        "What the module is for.\n\n    An indented line.\nThe end.\n\nA class.\n\nA method.\n\n"
        "Defined in a function.\n\nDefined under a condition."
    )
    assert list(installed_docs.modules(["documented"])) == [("documented", "documented/deep/module.py", text)]
    assert "documented" not in sys.modules


def test_modules_are_sorted_and_folders_of_others_skipped(package):
    for name in ("b.py", "a.py", "tests/c.py", "_vendor/d.py", "site-packages/e.py", "sub/f.py"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(f'"""Docs of {name}."""')
    ids = [module_id for _, module_id, _ in installed_docs.modules(["documented"])]
    assert ids == ["documented/a.py", "documented/b.py", "documented/sub/f.py"]


def test_a_docstring_that_repeats_is_kept_once(package):
    (package / "a.py").write_text('def f():\n    """Same."""\n\ndef g():\n    """Same."""')
    (package / "b.py").write_text('def f():\n    """Same."""\n\ndef g():\n    """Other."""')
    assert [text for *_, text in installed_docs.modules(["documented"])] == ["Same.", "Other."]


def test_a_long_paragraph_is_kept_only_where_it_comes_first(package):
    long = "A paragraph that classes inherit, which stands in more than one file."
    other = "Another one, as long as it, but which stands in no file other than b.py."
    (package / "a.py").write_text(f'"""Of a.\n\n{long}\n\nReturns\n"""')
    (package / "b.py").write_text(f'def f():\n    """Of b.\n\n    {long}\n\n    {other}\n\n    Returns\n    """')
    (package / "c.py").write_text(f'"""{long}"""')
    texts = {module_id: text for _, module_id, text in installed_docs.modules(["documented"])}
    assert texts["documented/a.py"] == f"Of a.\n\n{long}\n\nReturns"
    assert texts["documented/b.py"] == f"Of b.\n\n{other}\n\nReturns"
    assert "documented/c.py" not in texts


@pytest.mark.parametrize("damage", [b"def f(:", b'"""nul \0 byte"""', b'"""\xff not UTF-8"""'])
def test_a_file_that_does_not_parse_is_skipped(package, damage):
    (package / "bad.py").write_bytes(damage)
    (package / "good.py").write_text('"""Good."""')
    assert [module_id for _, module_id, _ in installed_docs.modules(["documented"])] == ["documented/good.py"]


def test_the_standard_library_is_read_without_what_lies_in_it():
    first = next(iter(installed_docs.modules(["python"])))
    assert first[:2] == ("python", "python/__future__.py")
    assert first[2].startswith("Record of phased-in incompatible language changes.")


@pytest.mark.parametrize("name", ["no_such_package", "os.path", ""])
def test_a_package_that_is_not_installed_is_named(name):
    with pytest.raises(DynarouteError, match=f"packages: '{name}'"):
        list(installed_docs.modules([name]))
    with pytest.raises(DynarouteError, match=f"packages: '{name}'"):
        installed_docs.version(name)


def test_versions_carry_no_local_tag(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert installed_docs.version("torch") == "2.13.0"


def test_a_package_is_found_under_the_name_of_its_distribution():
    assert installed_docs.version("ruamel.yaml")[0].isdigit()
    assert installed_docs.version("yaml") == importlib.metadata.version("PyYAML")
