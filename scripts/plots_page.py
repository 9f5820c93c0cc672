"""Makes the page that `dvc plots` fills in hold Vega itself, so that it draws without a network.

    python scripts/plots_page.py

Writes .dvc/tmp/plots.html, and names it in .dvc/config.local. `make env` does this. Without it, the
page loads Vega from the network.
"""

import argparse
from pathlib import Path

import vl_convert

from dynaroute.pipeline.terminal import output_of, program

PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
{refresh_tag}
<title>DVC plots</title>
<script>(function () {
VEGA
})();</script>
<style>table { border-spacing: 15px; }</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main() -> None:
    """Writes page and setting."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = Path(".dvc/tmp/plots.html")
    path.parent.mkdir(exist_ok=True)
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version="5.21")  # DVC's templates are for 5
    path.write_text(PAGE.replace("VEGA", vega), "utf-8")
    output_of("dvc", "config", "--quiet", "--local", "plots.html_template", "tmp/plots.html")


if __name__ == "__main__":
    with program("plots_page"):
        main()
