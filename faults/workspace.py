"""What the campaigns share: their command line, the finished run of the tiny pipeline, and how results are kept."""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from repository import REPOSITORY as REPOSITORY
from ruamel.yaml import YAML
from tiny_pipeline import LOCATE as LOCATE
from tiny_pipeline import MEASURED, RUNS, VARIANTS, Workspace, project_files

from dynaroute.pipeline.artifacts import write_json, write_text

REPORTS, PAGE = Path("reports/reliability"), Path("docs/reliability.md")  # what campaigns write
OWN_VARIANTS = ("P1", "J1")
DURATIONS = ".scratch/durations.json"
Row = dict[str, Any]


def parse_arguments(doc: str, **numbers: int) -> argparse.Namespace:
    """The command line of a campaign: where it works, and numbers with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, required=True, help="for the finished run, and how far campaigns are")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    return parser.parse_args()


def _folder_of_this_code(workspace: Path) -> Path:
    """Another folder for every state of the project's files: what was found with other code does not count."""
    digest = hashlib.sha256()
    for name in project_files():
        if not (Path(name) == PAGE or Path(name).is_relative_to(REPORTS)):
            digest.update(f"{name}\0{hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()}\n".encode())
    return workspace.absolute() / digest.hexdigest()[:12]


def run_campaign(
    name: str,
    arguments: argparse.Namespace,
    cases: Sequence[str],
    try_case: Callable[[str, random.Random], list[Row]],
    at_once: int = 1,
) -> None:
    """Tries all cases, and writes reports/reliability/NAME.json at the end, also at an early one.

    Each case draws from a generator of its own, so that it is the same whichever are tried before it or beside it.
    What a case gave is kept in the workspace at once, so a campaign that was stopped or killed goes on when it is
    started again.
    """
    kept = _folder_of_this_code(arguments.workspace) / f"{name}_seed{arguments.seed}.jsonl"
    commit = _commit()
    rows: dict[str, list[Row]] = {}
    errors: dict[str, str] = {}
    for line in kept.read_text("utf-8").splitlines(keepends=True) if kept.exists() else ():
        if line.endswith("\n"):  # the last one may be cut off
            rows |= json.loads(line)
    write_text(kept, "".join(json.dumps({case: found}) + "\n" for case, found in rows.items()))
    left = [case for case in cases if case not in rows]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"{name}: stopped"))
    pool = ThreadPoolExecutor(at_once)
    try:
        with kept.open("a", encoding="utf-8") as file, tqdm(total=len(cases), desc=name, unit="case") as progress:
            progress.update(len(cases) - len(left))
            futures = {pool.submit(try_case, case, random.Random(f"{arguments.seed}, {case}")): case for case in left}
            for future in as_completed(futures):
                case = futures[future]
                if error := future.exception():  # of the campaign itself: tried again when it is started again
                    errors[case] = f"{type(error).__name__}: {error}".strip()
                    progress.write(f"{case}: {errors[case]}")
                    continue
                rows[case] = future.result()
                file.write(json.dumps({case: rows[case]}) + "\n")
                file.flush()
                progress.update()
    finally:
        pool.shutdown(cancel_futures=True)
        tried = [case for case in cases if case in rows]
        write_json(
            REPOSITORY / REPORTS / f"{name}.json",
            {
                "commit": commit,
                "cases_planned": len(cases),
                "cases_tried": len(tried),
                "errors": errors,
                "rows": [row for case in tried for row in rows[case]],
            },
        )


def _commit() -> str:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":!{REPORTS}", f":!{PAGE}")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def finished_workspace(folder: Path) -> Workspace:
    """The tiny pipeline with two variants and one DWR run, after its first `dvc repro`, made if it is not there."""
    root = _folder_of_this_code(folder) / "repository"
    if (root / DURATIONS).exists():
        return _without_path(Workspace(root))
    shutil.rmtree(root, ignore_errors=True)
    workspace = _without_path(Workspace.create(root))
    own = {"variants": {name: VARIANTS[name] for name in OWN_VARIANTS}, "dwr_runs": {"reference": RUNS["reference"]}}
    change_params(workspace, **own)
    workspace.commit("fewer")
    started = time.monotonic()
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=root, env=workspace.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    starts = {"": started}
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if line.startswith("Running stage"):
            starts[line.split("'")[1]] = time.monotonic()
    if process.wait():
        raise SystemExit("the undisturbed run failed")
    shutil.rmtree(root / ".dvc/cache/runs")  # from which DVC would take a stage's results, instead of running it
    workspace.commit("results")
    times = [*starts.values(), time.monotonic()]
    seconds = {name: stop - start for name, start, stop in zip(starts, times[:-1], times[1:], strict=True)}
    write_json(root / DURATIONS, seconds)
    return workspace


def durations(workspace: Workspace) -> dict[str, float]:
    """Seconds of each stage in the undisturbed run, DVC's own before it "" and after each included."""
    return json.loads((workspace.root / DURATIONS).read_text())


@contextmanager
def copy_of(workspace: Workspace, root: Path) -> Iterator[Workspace]:
    """A copy to spoil, for as long as the block runs."""
    try:
        yield _without_path(workspace.copy(root))
    finally:
        shutil.rmtree(root)


def change_params(workspace: Workspace, **values: Any) -> None:
    """Sets what params.yaml holds at its top."""
    path = workspace.root / "params.yaml"
    params = YAML(typ="safe").load(path.read_text("utf-8"))
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params | values, file)


def contents(root: Path) -> dict[str, str]:
    """The hash of every file that must repeat."""
    files = [path for part in ("data", "reports") for path in (root / part).rglob("*") if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {
        name: hashlib.md5(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not any(word in name for word in MEASURED)
    }


def with_log(words: str, text: str) -> str:
    """An outcome: words of ours, and then the end of what a program said, which the page leaves out."""
    return f"{words}: {' / '.join(text.strip().splitlines()[-4:])[-300:]}"


def mended(workspace: Workspace, expected: Workspace, *command: str) -> str:
    """What `make recover` and then a pipeline to its end give, beside what they should."""
    done = workspace.run("make", "recover", check=False)
    if not done.returncode:
        done = workspace.run(*command, check=False)
    if done.returncode:
        return with_log("failed", done.stdout + done.stderr)
    found, want = contents(workspace.root), contents(expected.root)
    differing = sorted(name for name in found.keys() | want if found.get(name) != want.get(name))
    if not differing and workspace.hashes() != expected.hashes():
        differing = ["dvc.lock"]
    return f"other bytes in {', '.join(differing[:5])}" if differing else "the same bytes"


def _without_path(workspace: Workspace) -> Workspace:
    workspace.environment.pop("PYTHONPATH", None)  # the copy's code
    workspace.environment["PYTHONUNBUFFERED"] = "1"  # what DVC says is watched
    return workspace
