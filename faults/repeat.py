"""Runs the tiny pipeline again, with one thread and with two, and compares.

    python faults/repeat.py --workspace .scratch/faults

Again with the same settings: every file must have the same bytes, but for what is measured. With another number of
threads float sums are added in another order, and training multiplies the difference; so tokens must be the same, and
figures of the evaluation within TOLERANCE.

Writes  reports/reliability/repeat.json
"""

import csv
import json
import random
import tempfile
from pathlib import Path

from workspace import (
    OWN_VARIANTS,
    Row,
    Workspace,
    change_params,
    contents,
    copy_of,
    finished_workspace,
    parse_arguments,
    run_campaign,
)

TOLERANCE = 1e-3  # relative, of losses
THREADS = {"one thread": 1, "two threads": 2}


def main() -> None:
    """Runs, compares, and writes a row for each."""
    arguments = parse_arguments(__doc__, seed=0)
    pristine = finished_workspace(arguments.workspace)
    with tempfile.TemporaryDirectory() as folder:

        def try_case(case: str, _: random.Random) -> list[Row]:
            with copy_of(pristine, Path(folder) / "workspace") as workspace:
                return [again(workspace, THREADS[case])]

        run_campaign("repeat", arguments, list(THREADS), try_case)


def losses(root: Path) -> dict[str, float]:
    """The losses of the reports, by what they are."""
    found = {}
    dwr = json.loads((root / "data/dwr/train/summary.json").read_text())
    found |= {f"DWR {key}": dwr[key] for key in ("best_validation_loss", "test_loss")}
    export = json.loads((root / "data/dwr/export/summary.json").read_text())
    found |= {f"export, NLL in {row['precision']}": row["nll"] for row in export["precisions"]}
    found["base validation_loss"] = json.loads((root / "reports/dagformer/base.json").read_text())["validation_loss"]
    for variant in OWN_VARIANTS:
        with (root / f"reports/dagformer/{variant}/nll.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                for mode in ("soft", "hard", "baseline"):
                    place = f"{variant} {mode}, {row['protocol']} of window {row['window']}"
                    found[place] = float(row[f"nll_{mode}"])
    return found


def again(workspace: Workspace, threads: int) -> Row:
    """Runs all stages by force, and compares with the first run."""
    before, losses_before = contents(workspace.root), losses(workspace.root)
    change_params(workspace, num_threads=threads)
    workspace.run("dvc", "repro", "--force", "--no-run-cache")
    after, losses_after = contents(workspace.root), losses(workspace.root)
    same = {name for name in before if after.get(name) == before[name]}
    differences = {key: abs(losses_after[key] / losses_before[key] - 1) for key in losses_before}
    return {
        "threads": threads,
        "files": len(before),
        "of_the_same_bytes": len(same),
        "tokens_of_the_same_bytes": {name for name in before if name.startswith("data/tokens")} <= same,
        "losses": len(differences),
        "largest_difference": max(differences.values()),
        "largest_difference_is_of": max(differences, key=differences.get),
        "tolerance": TOLERANCE,
        "differing": sorted(before.keys() - same)[:10],
    }


if __name__ == "__main__":
    main()
