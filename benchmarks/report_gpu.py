"""Writes the page on what was measured on a GPU, as far as it was.

    python benchmarks/report_gpu.py    (in gpu/, as `make gpu` does; reports what is there so far)

Reads   cards.yaml, reports/dwr, reports/benchmarks, ../reports/reference.yaml
Writes  ../reports/gpu.md
"""

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import write_text
from dynaroute.pipeline.stage import run
from dynaroute.reporting.gpu import page


def main(settings: Settings) -> None:
    """Makes the page."""
    write_text("../reports/gpu.md", page(settings.device))


if __name__ == "__main__":
    run(main, __doc__)
