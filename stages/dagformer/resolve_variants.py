"""Writes all knobs of every DAGFormer variant and every DWR run: what params.yaml says of all, with their overrides.

    python stages/dagformer/resolve_variants.py

Writes  data/dagformer/variants/<id>.yaml  on which `train_dagformer@<id>` depends, and data/dwr/runs/<name>.yaml, on
        which `train_dwr_run@<name>` does: a knob at the top level, or of `dwr`, then reruns exactly what inherits it;
        data/dagformer/train/hub/encoder.yaml, the text encoder, on which encode_windows depends instead of on the
        base, unless the base itself encodes
"""

from pathlib import Path
from typing import Any

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import output_directory, write_yaml
from dynaroute.pipeline.stage import run


def main(settings: Settings) -> None:
    """Writes a file for each variant and each run."""
    variants = {
        name: {"from": overrides["from"], **settings.variant(name).model_dump()}
        for name, overrides in settings.variants.items()
    }
    write_knobs(Path("data/dagformer/variants"), variants)
    write_knobs(Path("data/dagformer/train/hub"), {"encoder": settings.dagformer.encoder.model_dump()})
    write_knobs(Path("data/dwr/runs"), {name: settings.dwr_run(name).model_dump() for name in settings.dwr_runs})


def write_knobs(directory: Path, knobs: dict[str, dict[str, Any]]) -> None:
    """Writes a file for each name."""
    with output_directory(directory) as folder:
        for name, own in knobs.items():
            write_yaml(folder / f"{name}.yaml", own)


if __name__ == "__main__":
    run(main, __doc__)
