"""Writes all knobs of every DAGFormer variant: those at the top level of params.yaml with the variant's overrides.

    python stages/resolve_variants.py

Writes  data/dagformer/variants/<id>.yaml, which `train_dagformer@<id>` tracks as its parameters: a knob at the top
        level then reruns exactly the variants that inherit it.
"""

from pathlib import Path

from ruamel.yaml import YAML

from dynaroute.artifacts import output_directory
from dynaroute.config import Settings
from dynaroute.stage import run

VARIANTS = Path("data/dagformer/variants")


def main(settings: Settings) -> None:
    """Writes a file for each variant."""
    with output_directory(VARIANTS) as folder:
        for name, overrides in settings.variants.items():
            knobs = {"from": overrides["from"], **settings.variant(name).model_dump()}
            YAML(typ="safe").dump(knobs, folder / f"{name}.yaml")


if __name__ == "__main__":
    run(main, __doc__)
