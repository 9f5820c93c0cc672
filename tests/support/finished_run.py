"""The stages of the tiny pipeline that faults befall, and the bytes that its files must have again after a fault."""

import hashlib
import shutil
from pathlib import Path

from repository import REPOSITORY
from ruamel.yaml import YAML
from tiny_pipeline import LOCATE, MEASURED, Workspace

from dynaroute.config import read_yaml

INSTANCES = {
    "${corpora}": ["docs"],
    "${variants}": ["P1", "J1"],  # J1 trains its base as well
    "${analysis.variants}": ["P1"],
    "${dwr_runs}": ["reference"],
    "${dwr.corpus}": ["docs"],
    "${dwr.also_validate_on}": [],
}


def stages() -> list[str]:
    """The stages, by the names that `dvc repro` takes: of several alike, one."""
    names = [LOCATE]
    for name, stage in read_yaml(REPOSITORY / "dvc.yaml")["stages"].items():
        loop = stage.get("foreach")
        items = None
        if loop:
            items = loop if isinstance(loop, dict) else INSTANCES.get(loop[0] if isinstance(loop, list) else loop, loop)
        names += [name] if items is None else [f"{name}@{item}" for item in items]
    return names


def contents(workspace: Workspace) -> dict[str, str]:
    """The hash of every file in data/ and reports/ that must repeat."""
    files = [path for part in ("data", "reports") for path in (workspace.root / part).rglob("*") if path.is_file()]
    names = {path.relative_to(workspace.root).as_posix(): path for path in files}
    return {
        name: hashlib.md5(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not any(word in name for word in MEASURED)
    }


def forget(workspace: Workspace, stage: str) -> None:
    """Makes it as if a stage had never run: neither outputs, nor a word of it in dvc.lock, git or DVC's run cache."""
    shutil.rmtree(workspace.root / ".dvc/cache/runs", ignore_errors=True)
    file, _, name = stage.rpartition(":")
    lock = workspace.root / Path(file).parent / "dvc.lock"
    recorded = read_yaml(lock)
    for out in recorded["stages"].pop(name)["outs"]:
        workspace.run("rm", "-rf", out["path"])
    YAML(typ="safe").dump(recorded, lock)
    workspace.commit(f"without {name}")
