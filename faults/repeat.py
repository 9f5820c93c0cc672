"""Runs the tiny pipeline again, with one thread and with two, and compares.

    python faults/repeat.py --workspace .scratch/faults

Again with the same settings: every file must have the same bytes, but for what is measured. With another number of
threads float sums are added in another order, and training multiplies the difference; so tokens must be the same, and
figures of the evaluation within TOLERANCE.

Writes  reports/reliability/repeat.json
"""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from kills import contents
from tiny_pipeline import TINY, VARIANTS
from workspace import REPOSITORY, Workspace, finished_workspace, parse_arguments

from dynaroute.artifacts import write_json

OUTPUT = REPOSITORY / "reports/reliability/repeat.json"
TOLERANCE = 1e-3  # relative, of losses


def losses(root: Path) -> dict[str, float]:
    """The losses of the reports, by what they are."""
    found = {}
    dwr = json.loads((root / "reports/dwr/training.json").read_text())
    found |= {f"DWR {key}": dwr[key] for key in ("best_validation_loss", "test_loss")}
    export = json.loads((root / "reports/dwr/export.json").read_text())
    found |= {f"export, NLL in {row['precision']}": row["nll"] for row in export["precisions"]}
    found["base validation_loss"] = json.loads((root / "reports/dagformer/base.json").read_text())["validation_loss"]
    for variant in VARIANTS:
        with (root / f"reports/dagformer/{variant}/nll.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                for mode in ("soft", "hard", "baseline"):
                    place = f"{variant} {mode}, {row['protocol']} of window {row['window']}"
                    found[place] = float(row[f"nll_{mode}"])
    return found


def again(workspace: Workspace, threads: int) -> dict[str, Any]:
    """Runs all stages by force, and compares with the first run."""
    before, losses_before = contents(workspace.root), losses(workspace.root)
    if threads != 1:
        own = {key: value for key, value in TINY.items() if not isinstance(value, dict)}
        workspace.set_params({"": own | {"num_threads": threads}})
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


def main() -> None:
    """Runs, compares, and writes a row for each."""
    arguments = parse_arguments(__doc__)
    pristine, rows = finished_workspace(arguments.workspace), []
    for threads in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(again(finished_workspace(pristine.copy(Path(folder) / "workspace").root), threads))
        write_json(OUTPUT, {"rows": rows})


if __name__ == "__main__":
    main()
