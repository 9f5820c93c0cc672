import importlib
import random
import re
import sys
from pathlib import Path

import pytest

from dynaroute.config.data import InstalledText
from dynaroute.data.text import installed
from dynaroute.errors import DynarouteError

MODULE = '''
"""What the module is for.

    An indented line.
The end.

>>> an_example()
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


def prose(seed: int, words: int = 150) -> str:
    """Lines of five words, none of which stands in the prose of another seed."""
    drawn = [f"w{number}x{seed}" for number in random.Random(seed).sample(range(10**6), words)]
    return "".join(" ".join(drawn[i : i + 5]) + "\n" for i in range(0, words, 5))


def pages(characters: int = 10**6, **domains: str) -> dict[str, tuple[str, str]]:
    """Domain and text by id; of each domain, a pattern of files whose whole text is read."""
    named = {name: {"read": "text", "paths": [pattern]} for name, pattern in domains.items()}
    source = InstalledText.model_validate({"kind": "installed_text", "characters": characters, "domains": named})
    return {page_id: (domain, text) for domain, page_id, text in installed.pages(source)}


def test_docstrings_come_cleaned_in_source_order_and_without_examples(package, monkeypatch):
    monkeypatch.setattr(installed, "SHORTEST", 1)
    (package / "deep").mkdir()
    (package / "deep/module.py").write_text(MODULE)
    (package / "deep/broken.py").write_text("def f(:")
    (package / "deep/latin.py").write_bytes(b'"""\xff not UTF-8"""')
    domain = {"read": "docstrings", "paths": ["documented/deep/*.py"]}
    source = {"kind": "installed_text", "characters": 10**6, "domains": {"prose": domain}}
    text = (
        "What the module is for.\n\n    An indented line.\nThe end.\n\nA class.\n\nA method.\n\n"
        "Defined in a function.\n\nDefined under a condition."
    )
    found = list(installed.pages(InstalledText.model_validate(source)))
    assert found == [("prose", "documented/deep/module.py#1", text)]
    assert "documented" not in sys.modules


def test_all_files_give_a_first_page_before_one_gives_a_second(package):
    for seed in range(5):
        (package / f"{seed}.txt").write_text(prose(seed, 900))
    first = {f"documented/{seed}.txt#1" for seed in range(5)}
    assert set(pages(4 * installed.PAGE, a="documented/*.txt")) == first
    assert set(list(pages(a="documented/*.txt"))[:5]) == first
    assert "".join(text + "\n" for _, text in pages(a="documented/0.txt").values()) == prose(0, 900)


def test_each_domain_gets_the_characters_asked_for_and_hardly_more(package):
    for seed in range(12):
        (package / f"{seed}.{'ab'[seed % 2]}").write_text(prose(seed, 400))
    found = pages(9000, a="documented/*.a", b="documented/*.b")
    for name in "ab":
        assert 9000 <= sum(len(text) for domain, text in found.values() if domain == name) < 9000 + installed.PAGE


def test_what_stands_in_an_earlier_file_is_left_out_whatever_its_punctuation_and_domain(package):
    licence = prose(99)
    (package / "a.txt").write_text(licence + prose(1))
    (package / "b.h").write_text("".join(f"// {line}\n" for line in licence.upper().splitlines()) + prose(2))
    (package / "c.h").write_text(licence)
    found = pages(text="documented/*.txt", headers="documented/*.h")
    assert found == {
        "documented/a.txt#1": ("text", (licence + prose(1)).rstrip()),
        "documented/b.h#1": ("headers", prose(2).rstrip()),
    }


def test_short_repetitions_stay(package):
    (package / "a.txt").write_text(prose(1) + "return self\n" + prose(2) + "return self\n")
    assert pages(a="documented/*.txt")["documented/a.txt#1"][1].count("return self") == 2


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("no_such_package/*", "starts with 'no_such_package', which is not an installed package"),
        ("os.path/*", "starts with 'os.path', which is not"),
        ("/etc/*", "starts with '', which is not"),
        ("documented/*.csv", "matches no file of documented"),
        ("documented//etc/*", "is not a usable pattern"),
        ("documented/../*.py", "(is not a usable pattern|matches no file)"),
        ("documented", "must go on after the package, such as documented/"),
    ],
)
def test_a_pattern_without_files_is_named(package, pattern, problem):
    with pytest.raises(DynarouteError, match=f"^paths: '{re.escape(pattern)}' {problem}"):
        pages(a=pattern)


def test_a_package_is_found_under_the_name_of_its_distribution_and_its_version_has_no_local_tag(monkeypatch):
    assert installed.version("ruamel.yaml")[0].isdigit()
    assert installed.version("yaml") == importlib.metadata.version("PyYAML")
    with pytest.raises(DynarouteError, match="'no_such_package' is not an installed package"):
        installed.version("no_such_package")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0+cpu")
    assert installed.version("torch") == "2.13.0"
