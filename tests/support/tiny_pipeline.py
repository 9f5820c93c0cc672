"""The real pipeline at tiny settings, in a copy of the repository."""

import contextlib
import copy
import functools
import operator
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from repository import REPOSITORY
from ruamel.yaml import YAML

from dynaroute.config import read_yaml

SMOKE = read_yaml(REPOSITORY / "params/smoke.yaml")
VARIANTS = SMOKE["variants"]
LOCATE = "stages/data/dvc.yaml:locate"  # runs every time
# What is measured differs from run to run, and lives in files of its own.
MEASURED = ("measured",)


def project_files() -> list[str]:
    """The project's files as git sees them, with those that are not yet added, but nothing that the pipeline writes."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    return [name for name in files if name and (REPOSITORY / name).is_file() and not _is_written_by_the_pipeline(name)]


def _is_written_by_the_pipeline(name: str) -> bool:
    """What DVC recorded, and committed reports, which may be of variants that the tiny settings do not have."""
    kept = ("reports/reference.yaml", "reports/benchmarks/")
    return name.endswith("dvc.lock") or (name.startswith("reports/") and not name.startswith(kept))


class Workspace:
    """A git repository with the project's files, in which commands run as a user would type them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # A proxy that nobody serves: a stage that touches the network fails.
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "DVC_NO_ANALYTICS": "1",
        }

    @classmethod
    def create(cls, root: Path) -> "Workspace":
        for name in project_files():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, root / name)
        workspace = cls(root)
        workspace.set_params({})
        workspace.run("git", "init", "-q")
        workspace.commit("tiny")
        return workspace

    def copy(self, root: Path) -> "Workspace":
        shutil.copytree(self.root, root, symlinks=True)
        return Workspace(root)

    def set_params(self, changes: dict[str, dict]) -> None:
        """Writes params.yaml: the tiny settings, with values changed in some sections, such as `dwr.training`."""
        params = copy.deepcopy(SMOKE)
        for section, values in changes.items():
            functools.reduce(operator.getitem, section.split("."), params).update(values)
        YAML(typ="safe").dump(params, self.root / "params.yaml")

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *command: str, output: Path = Path(os.devnull)) -> subprocess.Popen:
        """Starts a command in a process group of its own, so that all of it can be killed."""
        with output.open("wb") as file:
            return subprocess.Popen(
                command, cwd=self.root, env=self.environment, start_new_session=True, stdout=file, stderr=file
            )

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        self.run("git", *identity, "commit", "--allow-empty", "-qm", message)

    def lock(self) -> dict:
        files = (self.root / folder / "dvc.lock" for folder in ("", "stages/data"))
        return {name: stage for file in files for name, stage in YAML(typ="safe").load(file)["stages"].items()}

    def hashes(self) -> dict[str, str]:
        """The hash of every output that must repeat."""
        outs = [out for stage in self.lock().values() for out in stage.get("outs", [])]
        return {out["path"]: out["md5"] for out in outs if not any(word in out["path"] for word in MEASURED)}

    def wait_for_checkpoint(self, step: int) -> None:
        """Returns once the training in this workspace has saved a step of at least `step`."""
        from dynaroute.errors import DynarouteError
        from dynaroute.training.checkpoints import load_checkpoint  # with torch, which most tests here do without

        def saved() -> bool:
            for path in self.root.glob(".scratch/train_dwr/*/last.safetensors"):
                with contextlib.suppress(DynarouteError):  # it is opened twice, and may be replaced in between
                    return load_checkpoint(path)[1]["step"] >= step
            return False

        wait_until(saved)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ran(output: str) -> set[str]:
    """The stages that DVC says it ran."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running")}
