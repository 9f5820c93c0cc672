"""SHA-256 of files whose edits stages must notice, such as models and text on disk.

They are asked for on every `dvc repro`, so a file of gigabytes is read again only when it may have changed: what was
found is kept in .scratch/, with each file's size, times and inode.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynaroute.pipeline.artifacts import sha256, write_json
from dynaroute.pipeline.scratch import exclusive, scratch_folder

SETTLED = 2 * 10**9  # nanoseconds: within a clock's granularity, an edit leaves a file's times as they were


def hash_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """`{"bytes": ..., "sha256": ...}` of files, by their names.

    Raises:
        DynarouteError: a file cannot be read.
    """
    if not files:
        return {}
    folder, found = scratch_folder("locate", "hashes"), {}
    with exclusive(folder):
        notes = folder / "notes.json"
        known = read_notes(notes)
        before = dict(known)
        for name, path in tqdm(files.items(), desc="hash", unit="file", delay=2, disable=None):
            key, now, state = os.fsencode(path.absolute()).decode("latin-1"), time.time_ns(), _state(path)
            if known.get(key, [None])[0] != state:
                settled = max(state["modified"], state["changed"]) < now - SETTLED
                known[key] = [state if settled else None, sha256(path)]
            name = name.encode(errors="backslashreplace").decode()  # one that is not UTF-8 cannot be written elsewhere
            found[name] = {"bytes": state["bytes"], "sha256": known[key][1]}
        known = {key: note for key, note in known.items() if Path(os.fsdecode(key.encode("latin-1"))).exists()}
        if known != before:
            write_json(notes, known)
    return found


def read_notes(path: Path) -> dict[str, Any]:
    """What an earlier run noted; empty where there is nothing, or nothing readable."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _state(path: Path) -> dict[str, int]:
    state = path.stat()
    return {"bytes": state.st_size, "modified": state.st_mtime_ns, "changed": state.st_ctime_ns, "inode": state.st_ino}
