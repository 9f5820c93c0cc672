"""Settings and corpora as nobody should write them.

    python faults/inputs.py --cases 900 --workspace .scratch/faults

Settings are those of the repository with one thing changed at random: a value of another type or size, a key left out,
misspelt, added or moved, or bytes of the file. They must be refused in one line that names params.yaml, or accepted
with every variant resolved. Corpora are made of odd pieces: byte-order marks, carriage returns, special tokens, bytes
that are not UTF-8, half surrogate pairs, blank documents, ids that occur twice. They must be refused in one line, or
decode from their tokens to the very text that a plain reading gives. A gigabyte on one line, in a gzip and as a file,
meets `collect` in two gigabytes of address space. Some overrides go through `dvc exp run -S`: it must stop in the first
stage.

A campaign that was stopped goes on when it is started again.

Writes  reports/reliability/inputs.json
"""

import copy
import gzip
import json
import math
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from workspace import (
    LOCATE,
    REPOSITORY,
    Row,
    Workspace,
    change_params,
    copy_of,
    finished_workspace,
    parse_arguments,
    run_campaign,
    with_log,
)

from dynaroute.config import Corpus, load_settings, read_yaml
from dynaroute.data.text.collect import SPLITS, collect
from dynaroute.data.tokens.encode import tokenize
from dynaroute.data.tokens.shards import TokenShards
from dynaroute.errors import DynarouteError

VALUES = [
    None, True, "", "x", "1e400", "../x", "a b", "\0", "ü" * 300, [], [1], {}, {"kind": "?"}, 0, -1, 1, 2**31,
    2**70,     -(2**70), 0.5, -0.0, 1e-308, 1e308, math.inf, -math.inf, math.nan,
]  # fmt: skip
PIECES = [
    "the cat sat on the mat ", "\r\n", "\n", "\ufeff", "<|endoftext|>", "\0", "\t", "über 数学 🙂 ", "e\u0301",
    "   ",     "\u2028", "[INST]", "'s", "3.14159", "\x85",
]  # fmt: skip
HUGE = {"dolma": "texts.json.gz", "files": "texts.txt"}  # kinds of sources, and a file for each
GIGABYTE = 2**30
OVERRIDES = ["tau_fnal=0.1", "tau_final=cold", "dwr.top_k=99", "dwr.training.lr=-1", "variants.P1.rank=0", "seed=[1]"]


def places(data: Any, at: tuple = ()) -> Iterator[tuple]:
    """The paths of all that is in nested mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def changed_settings(draw: random.Random, path: Path) -> str:
    """Writes settings with one thing changed; what was done."""
    source = REPOSITORY / draw.choice(["params.yaml", "params.paper.yaml"])
    if draw.random() < 0.1:
        content = bytearray(source.read_bytes())
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        return "bytes of the file"
    data = copy.deepcopy(read_yaml(source))
    *above, key = draw.choice(list(places(data)))
    parent = data
    for part in above:
        parent = parent[part]
    what = draw.choice(["value", "value", "value", "left out", "misspelt", "added", "nested"])
    if what == "value":
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    elif what == "left out":
        del parent[key]
    elif what == "nested":
        parent[key] = {str(key): parent[key]}
    elif isinstance(parent, dict):
        name = str(key)
        at = draw.randrange(len(name))
        parent[name[:at] + draw.choice("xyz_") + name[at + (what == "misspelt") :]] = parent[key]
        if what == "misspelt":
            del parent[key]
    else:
        parent.append(copy.deepcopy(draw.choice(VALUES)))
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(data, file)
    return {"value": "another value", "left out": "a key left out", "misspelt": "a key misspelt"}.get(
        what, f"a key {what}"
    )


def judge_settings(path: Path) -> str:
    """What loading them does."""
    try:
        settings = load_settings(path)
        for name in settings.variants:
            json.dumps(settings.variant(name).model_dump(), allow_nan=False)
    except DynarouteError as error:
        text = str(error)
        one_line = "\n" not in text and path.name in text
        return "refused in one line" if one_line else with_log("refused in several lines", text)
    except Exception as error:
        return with_log("a crash", f"{type(error).__name__}: {error}")
    return "accepted"


def odd_text(draw: random.Random) -> str:
    """A text of odd pieces, mostly short."""
    text = "".join(draw.choices(PIECES, k=draw.choice([0, 1, 1, 5, 20, 200])))
    return text * (50_000 // (len(text) + 1)) if draw.random() < 0.01 else text


def odd_corpus(draw: random.Random, folder: Path) -> tuple[str, dict[str, Any], dict[str, str] | None]:
    """Writes a corpus; its kind, its source, and by id what a plain reading gives, or None where it must be refused."""
    ids = [f"{number}-{draw.choice(['a', 'ü', ' ', '#'])}" for number in range(draw.choice([0, 1, 40, 40, 40]))]
    texts = {name: odd_text(draw) for name in ids}
    fault = draw.choice([None, None, "invalid UTF-8", "an id twice"])
    refused = fault is not None and bool(ids)
    if draw.random() < 0.5:
        (folder / "texts").mkdir()
        plain = {}
        for number, text in enumerate(texts.values()):
            path = folder / f"texts/{number:03d}.txt"
            path.write_bytes(text.encode() + (b"\xff\xfe" if fault == "invalid UTF-8" and number == 0 else b""))
            # universal newlines and one byte-order mark at the start, as any reader of text files does
            plain[f"texts/{number:03d}.txt"] = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        source = {"kind": "files", "paths": [str(folder / "texts/*.txt")]}
        return "files", source, None if refused and fault == "invalid UTF-8" else plain
    lines = [
        json.dumps({"id": name, "text": text, "source": draw.choice("ab")}).encode() for name, text in texts.items()
    ]
    plain = dict(texts)
    if fault == "invalid UTF-8" and lines:
        lines[-1] = lines[-1].replace(b'"text": "', b'"text": "\xff')
    elif fault == "an id twice" and lines:
        lines.append(lines[0])
        if not texts[ids[0]] or texts[ids[0]].isspace():
            refused = False  # blank documents are left out, twice or not
    elif lines and draw.random() < 0.3:
        lines[0] = lines[0].replace(b'"text": "', b'"text": "\\ud800')
        plain[ids[0]] = "\ufffd" + plain[ids[0]]
    content = b"\n".join(lines) + (b"\n" if draw.random() < 0.5 else b"")
    (folder / "texts.json.gz").write_bytes(gzip.compress(content))
    return "dolma", {"kind": "dolma", "paths": [str(folder / "texts.json.gz")]}, None if refused else plain


def judge_corpus(source: dict[str, Any], plain: dict[str, str] | None, folder: Path) -> str:
    """What collecting and tokenizing does."""
    corpus = Corpus.model_validate(
        {"source": source, "split": {"validation": 0.2, "test": 0.2}, "tokenizer": {"kind": "bpe", "vocab_size": 257}}
    )
    try:
        collect("odd", corpus, folder / "raw")
        tokenize("odd", corpus.tokenizer, folder / "raw", folder / "tokens")
    except DynarouteError as error:
        text = str(error)
        if "\n" in text:
            return with_log("refused in several lines", text)
        if plain is not None and sum(not (not text or text.isspace()) for text in plain.values()) > 30:
            return with_log("refused without a reason", text)
        return "refused in one line"
    except Exception as error:
        return with_log("a crash", f"{type(error).__name__}: {error}")
    if plain is None:
        return "accepted what must be refused"
    found = []
    for split in SPLITS:
        shards = TokenShards(folder / "tokens", split)
        tokenizer = shards.tokenizer()
        for start, stop in zip(shards.offsets[:-1], shards.offsets[1:], strict=True):
            ids = shards.read(int(start), int(stop)).tolist()
            if ids[-1] != shards.eot_id or shards.eot_id in ids[:-1]:
                return "end-of-text within a document"
            found.append(tokenizer.decode(ids[:-1]))
    expected = sorted(text for text in plain.values() if text and not text.isspace())
    return "the very text" if sorted(found) == expected else "another text"


def judge_override(workspace: Workspace, override: str) -> str:
    """What `dvc exp run -S` does."""
    done = workspace.run("dvc", "exp", "run", "-S", override, check=False)
    text = done.stdout + done.stderr
    said = [line for line in text.splitlines() if line.startswith("locate: params.yaml: ")]
    ran = [line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage")]
    workspace.run("git", "checkout", "params.yaml")
    if done.returncode and ran in ([], [LOCATE]) and (len(said) == 1 or not ran):
        return "refused in one line by the first stage" if said else "refused by DVC itself"
    return with_log(f"ran {', '.join(ran)}", text)


def judge_huge_document(workspace: Workspace, kind: str) -> str:
    """What `collect` does with a gigabyte on one line, in two gigabytes of address space, Python's own included."""
    path = workspace.root / HUGE[kind]
    if kind == "dolma":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'{"id": "0", "source": "a", "text": "')
            for _ in range(GIGABYTE // 2**20):
                file.write(b"a" * 2**20)
            file.write(b'"}\n')
    else:
        with path.open("wb") as file:
            file.truncate(GIGABYTE + 1)  # zeros, which are text, and take no room on the disk
    corpora = read_yaml(workspace.root / "params.yaml")["corpora"]
    corpora["huge"] = corpora["docs"] | {"source": {"kind": kind, "paths": [path.name]}}
    change_params(workspace, corpora=corpora)
    limited = f"ulimit -v {2 * GIGABYTE // 1024}; PYTHONPATH=src exec python stages/data/collect.py huge"
    done = workspace.run("bash", "-c", limited, check=False)
    said = done.stderr.strip().splitlines()[-1:]
    if not done.returncode:
        return "accepted what must be refused"
    refused = "Traceback" not in done.stderr and said and said[0].startswith(f"collect: {path.name}")
    return "refused in one line" if refused else with_log("a crash", done.stderr)


def main() -> None:
    """Tries all, and writes a row for each case."""
    arguments = parse_arguments(__doc__, cases=900, seed=0)
    pristine = finished_workspace(arguments.workspace)

    def try_case(case: str, draw: random.Random) -> list[Row]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if case.startswith("-S "):
                override = case.removeprefix("-S ")
                with copy_of(pristine, folder / "workspace") as workspace:
                    return [{"kind": "override", "what": override, "outcome": judge_override(workspace, override)}]
            if case in HUGE:
                with copy_of(pristine, folder / "workspace") as workspace:
                    return [{"kind": "gigabyte line", "what": case, "outcome": judge_huge_document(workspace, case)}]
            if int(case) % 5:
                what = changed_settings(draw, folder / "params.yaml")
                return [{"kind": "settings", "what": what, "outcome": judge_settings(folder / "params.yaml")}]
            kind, source, plain = odd_corpus(draw, folder)
            return [{"kind": "corpus", "what": kind, "outcome": judge_corpus(source, plain, folder)}]

    cases = [*HUGE, *(f"-S {override}" for override in OVERRIDES), *map(str, range(arguments.cases))]
    run_campaign("inputs", arguments, cases, try_case)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
