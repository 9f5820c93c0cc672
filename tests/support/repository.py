"""Where the repository lies: a module of its own, since several folders have a conftest, and names must not clash."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def stage_script(name: str) -> Path:
    """The script of a stage, in whichever folder of stages/ it is."""
    (path,) = REPOSITORY.glob(f"stages/*/{name}.py")
    return path
