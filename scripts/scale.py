"""Runs the pipeline at another scale, and copies its pages to reports/NAME/.

    make scale NAME=smollm          or: python scripts/scale.py smollm [TARGET ...]

params/NAME.yaml replaces params.yaml in a git worktree, .scales/NAME, of the current commit. The worktree has its own
dvc.lock; it shares DVC's cache and the folder inputs/, for text and models of your own. Stop it at any time: the same
command resumes. A later commit replaces the code there, and DVC runs again what that changes. The files of the default
run stay as they are.

TARGET  DVC targets, instead of those that params/scales.yaml names for this scale
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dynaroute.config import read_yaml
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import output_directory
from dynaroute.pipeline.terminal import output_of, program

LOCKS = ("dvc.lock", "benchmarks/dvc.lock")
REFERENCE = Path("reports/reference.yaml")  # read by stages, written by none


def main() -> None:
    """Prepares the worktree, runs DVC there and copies its reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of a file in params/")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="DVC targets")
    given = parser.parse_args()
    params = Path("params") / f"{given.name}.yaml"
    if not params.is_file() or given.name == "scales":
        known = sorted({path.stem for path in Path("params").glob("*.yaml")} - {"scales"})
        raise DynarouteError(f"scale {given.name}: there is no {params}; scales: {', '.join(known)}")
    if output_of("git", "status", "--porcelain", "src", "stages", "dvc.yaml", "stages/data/dvc.yaml", "benchmarks"):
        print("uncommitted changes of code are not part of this run: it takes the current commit", file=sys.stderr)
    worktree = Path(".scales") / given.name
    prepare(worktree)
    shutil.copyfile(params, worktree / "params.yaml")
    targets = given.targets or read_yaml("params/scales.yaml").get(given.name, [])
    output_of("sh", "scripts/recover.sh", cwd=worktree)
    # Beside other work, threads that wait by spinning would stall one another.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    command = ["dvc", "repro", "--keep-going", *targets]
    try:
        status = subprocess.run(command, cwd=worktree, env=environment, check=False).returncode
    except KeyboardInterrupt:
        raise DynarouteError(f"stopped; make scale NAME={given.name} resumes") from None
    if status:
        raise DynarouteError(f"dvc repro failed in {worktree}; its finished stages are kept")
    with output_directory(Path("reports") / given.name) as folder:
        for path in reports(worktree):
            target = folder / path.relative_to(worktree / "reports")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    print(f"pages: reports/{given.name}/")


def prepare(worktree: Path) -> None:
    """Makes the worktree, or moves it to the current commit and keeps the results it has."""
    commit = output_of("git", "rev-parse", "HEAD")
    if not (worktree / ".git").exists():
        output_of("git", "worktree", "prune")
        output_of("git", "worktree", "add", "--quiet", "--force", "--detach", str(worktree), commit)
        discard_reports(worktree)
    elif output_of("git", "rev-parse", "HEAD", cwd=worktree) != commit:
        locks = [path for name in LOCKS if (path := worktree / name).is_file()]
        results = {path: path.read_bytes() for path in [*locks, *reports(worktree)]}
        output_of("git", "checkout", "--quiet", "--force", "--detach", commit, cwd=worktree)
        discard_reports(worktree)
        for path, data in results.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    Path("inputs").mkdir(exist_ok=True)
    if not (worktree / "inputs").is_symlink():
        (worktree / "inputs").symlink_to(Path("inputs").resolve())
    output_of("dvc", "cache", "dir", "--local", output_of("dvc", "cache", "dir"), cwd=worktree)


def reports(worktree: Path) -> list[Path]:
    """What stages have written under reports/."""
    return [path for path in (worktree / "reports").rglob("*") if path.is_file() and path != worktree / REFERENCE]


def discard_reports(worktree: Path) -> None:
    """Removes the pages of the default run and of other scales, so that what is there is of this scale."""
    for path in reports(worktree):
        path.unlink()


if __name__ == "__main__":
    with program("scale"):
        main()
