"""SHA-256 of files on disk, such as models and text, whose edits must rerun stages.

Every `dvc repro` asks for them, so hashes are kept in .scratch/ with each file's size, times and inode, and a file is
read again only if one of those has changed.
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

SETTLED = 2 * 10**9  # nanoseconds: an edit within the clock's granularity does not change a file's times


def hash_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """`{"bytes": ..., "sha256": ...}` of files by name. Raises DynarouteError if a file cannot be read."""
    if not files:
        return {}
    folder, found = scratch_folder("locate", "hashes"), {}
    with exclusive(folder):
        notes = folder / "notes.json"
        known = read_notes(notes)
        before = dict(known)
        for name, path in tqdm(files.items(), desc="hash", unit="file", delay=2, disable=None):
            key, now, stat = os.fsencode(path.absolute()).decode("latin-1"), time.time_ns(), path.stat()
            times = {"modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns}
            state = {"bytes": stat.st_size, **times, "inode": stat.st_ino}
            if known.get(key, [None])[0] != state:
                settled = max(times.values()) < now - SETTLED
                known[key] = [state if settled else None, sha256(path)]
            name = name.encode(errors="backslashreplace").decode()  # JSON needs UTF-8
            found[name] = {"bytes": state["bytes"], "sha256": known[key][1]}
        known = {key: note for key, note in known.items() if Path(os.fsdecode(key.encode("latin-1"))).exists()}
        if known != before:
            write_json(notes, known)
    return found


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of an earlier run; empty if they are missing or unreadable."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
