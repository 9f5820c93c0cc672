"""`dvc plots` draws its curves without a network."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Runs the page's first script, as a browser would.
LOAD = """
const html = require("fs").readFileSync(process.argv[1], "utf8");
globalThis.window = globalThis;
(0, eval)(html.match(/<script[^>]*>([^]*?)<\\/script>/)[1]);
console.log(typeof vegaEmbed);
"""


@pytest.fixture
def page(tmp_path):
    def run(*command):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    run("dvc", "init", "--no-scm", "--quiet")
    (tmp_path / "curve.csv").write_text("step,loss\n0,2.0\n1,1.5\n2,1.2\n")
    run(sys.executable, REPOSITORY / "scripts/plots_page.py")
    run("dvc", "plots", "show", "curve.csv")
    return tmp_path / "dvc_plots/index.html"


def test_the_page_loads_nothing(page):
    html = page.read_text("utf-8")
    assert "vegaEmbed('#" in html
    assert re.findall(r"(?:src|href)=.https?:[^>]*", html) == []


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the page's script")
def test_the_page_defines_what_draws_its_curves(page):
    loaded = subprocess.run(["node", "-e", LOAD, page], capture_output=True, text=True)
    assert loaded.stdout == "function\n", loaded.stderr
