"""`dvc plots` draws its curves without a network."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Draws every curve of the page with the Vega that the page holds; prints how many lines came out.
DRAW = """
const html = require("fs").readFileSync(process.argv[1], "utf8");
const scripts = [...html.matchAll(/<script[^>]*>([^]*?)<\\/script>/g)].map(match => match[1]);
globalThis.window = globalThis;
(0, eval)(scripts[0]);
const specs = [];
globalThis.vegaEmbed = (_, spec) => specs.push(spec);
scripts.slice(1).forEach(script => (0, eval)(script));
Promise.all(specs.map(spec => new vega.View(vega.parse(vegaLite.compile(spec).spec), { renderer: "none" }).toSVG()))
  .then(drawn => console.log(drawn.filter(svg => svg.includes("mark-line")).length));
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
def test_the_page_draws_the_curve(page):
    drawn = subprocess.run(["node", "-e", DRAW, page], capture_output=True, text=True)
    assert drawn.stdout == "1\n", drawn.stderr
