"""What the campaigns share: their command line, and the finished run of the tiny pipeline that they work on."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from repository import REPOSITORY as REPOSITORY
from tiny_pipeline import LOCATE as LOCATE
from tiny_pipeline import MEASURED as MEASURED
from tiny_pipeline import Workspace

DURATIONS = ".scratch/durations.json"


def parse_arguments(doc: str, **numbers: int) -> argparse.Namespace:
    """The command line of a campaign: where it works, and numbers with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True, help="a finished run, made if it is not there")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    return parser.parse_args()


def finished_workspace(root: Path) -> Workspace:
    """The workspace in a folder after its first `dvc repro`, which is run if it was not."""
    root = root.absolute()
    if (root / DURATIONS).exists():
        return _without_path(Workspace(root))
    workspace = _without_path(Workspace.create(root))
    started = time.monotonic()
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=root, env=workspace.environment | {"PYTHONUNBUFFERED": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    starts, startup = {}, 0.0
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if line.startswith("Running stage"):
            starts[line.split("'")[1]] = time.monotonic()
            startup = startup or time.monotonic() - started
    if process.wait():
        raise SystemExit("the undisturbed run failed")
    workspace.commit("results")
    ends = [*list(starts.values())[1:], time.monotonic()]
    seconds = {name: startup + end - start for (name, start), end in zip(starts.items(), ends, strict=True)}
    (root / DURATIONS).parent.mkdir(exist_ok=True)
    (root / DURATIONS).write_text(json.dumps(seconds))
    return workspace


def durations(workspace: Workspace) -> dict[str, float]:
    """Seconds that `dvc repro` of each stage alone took, DVC's own included."""
    return json.loads((workspace.root / DURATIONS).read_text())


def _without_path(workspace: Workspace) -> Workspace:
    workspace.environment.pop("PYTHONPATH", None)  # the copy's code
    return workspace
