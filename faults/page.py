"""Writes docs/reliability.md: what the campaigns found, between words that say what is promised.

    python faults/page.py

Reads   reports/reliability/*.json
Writes  docs/reliability.md
"""

from collections import Counter
from pathlib import Path
from typing import Any

from workspace import PAGE, REPORTS, REPOSITORY, Row

from dynaroute.pipeline.artifacts import read_json, write_text

TEMPLATE = Path(__file__).with_name("reliability.md")
AS_PROMISED = {  # outcomes; of `repeat`, see `as_promised`
    "kills": ["the same bytes"],
    "situations": ["the same bytes"],
    "corruption": ["an error that names the file", "the same values"],
    "inputs": [
        *("refused in one line", "refused in one line by the first stage", "refused by DVC itself"),
        *("accepted", "the very text"),
    ],
}


def campaign(name: str) -> dict[str, Any]:
    """What a campaign wrote."""
    return read_json(REPOSITORY / REPORTS / f"{name}.json")


def rows(name: str) -> list[Row]:
    """What came of its cases."""
    return campaign(name)["rows"]


def extent(name: str) -> str:
    """Which code it tried, and how far it got."""
    found = campaign(name)
    own = [row for row in rows(name) if row.get("outcome") != "not tried"]
    tried = found["cases_tried"] - (len(rows(name)) - len(own))  # only of cases with one row
    what = {"kills": "kills", "repeat": "runs"}.get(name, "cases")
    broken = "".join(
        f"\n- {case}: the campaign itself failed ({text.partition(':')[0]})" for case, text in found["errors"].items()
    )
    return (
        f"At commit {found['commit']}, {tried} of {found['cases_planned']} cases tried; as promised: "
        f"{sum(as_promised(name, row) for row in own)} of {len(own)} {what}.{broken}"
    )


def as_promised(name: str, row: Row) -> bool:
    """Whether what came of a case is what the page promises."""
    if name == "repeat":
        return row["tokens_of_the_same_bytes"] and row["largest_difference"] <= row["tolerance"]
    return row["outcome"] in AS_PROMISED[name]


def words(outcome: str) -> str:
    """An outcome without the end of what a program said, for which see `reports/reliability/`."""
    return outcome.partition(": ")[0]


def table(header: list[str], lines: list[list[object]]) -> str:
    """A Markdown table; all columns but the first hold numbers or words."""
    text = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in text)


def by(name: str, key: str) -> str:
    """How often each outcome was seen, for each value of a key."""
    found: dict[str, Counter] = {}
    for row in rows(name):
        found.setdefault(row[key], Counter())[words(row["outcome"])] += 1
    outcomes = list(dict.fromkeys(words(row["outcome"]) for row in rows(name)))
    lines = [[what, counts.total(), *(counts[one] for one in outcomes)] for what, counts in found.items()]
    lines.append(["all", len(rows(name)), *(sum(counts[one] for counts in found.values()) for one in outcomes)])
    return table([key, "cases", *outcomes], lines)


def kills() -> str:
    """Kills by stage: how many, when, whom, and what came of it."""
    found: dict[str, list[Row]] = {}
    for row in rows("kills"):
        found.setdefault(row["stage"].partition("@")[0], []).append(row)
    found["all"] = rows("kills")

    def count(own: list[Row], **wanted: object) -> int:
        return sum(all(row[key] == value for key, value in wanted.items()) for row in own)

    lines = [
        [
            stage,
            len(own),
            count(own, killed="all"),
            count(own, killed="DVC alone"),
            count(own, stage_at_work=True),
            count(own, command="dvc exp run"),
            count(own, outcome="the same bytes"),
        ]
        for stage, own in found.items()
    ]
    header = ["stage", "kills", "of all processes", "of DVC alone", "while the stage was at work"]
    shown = table([*header, "under `dvc exp run`", "mended, to the same bytes"], lines)
    broken = {f"- {row['stage']}, `{row['command']}`: {words(row['outcome'])}" for row in rows("kills")}
    broken = sorted(line for line in broken if not line.endswith("the same bytes"))
    return "\n".join([shown, *(["", "Not mended:", "", *broken] if broken else [])])


def situations() -> str:
    """Situations: how often, what the pipeline said, and what came of it."""
    found = Counter((row["situation"], words(row["then"]), words(row["outcome"])) for row in rows("situations"))
    lines = [[situation, cases, then, outcome] for (situation, then, outcome), cases in found.items()]
    return table(["situation", "cases", "what happened", "after `make recover && dvc repro`"], lines)


def repeat() -> str:
    """The second runs."""
    lines = [
        [
            row["threads"],
            f"{row['of_the_same_bytes']} of {row['files']}",
            "yes" if row["tokens_of_the_same_bytes"] else "no",
            f"{row['largest_difference']:.2g} ({row['largest_difference_is_of']})",
            "yes" if row["largest_difference"] <= row["tolerance"] else "no",
        ]
        for row in rows("repeat")
    ]
    header = ["threads", "files of the same bytes", "tokens the same", "largest relative difference of a loss"]
    return table([*header, f"within {rows('repeat')[0]['tolerance']:g}"], lines)


def main() -> None:
    """Fills the template."""
    text = TEMPLATE.read_text("utf-8")
    for name, source, make in (
        ("kills", "kills", kills),
        ("situations", "situations", situations),
        ("corruption", "corruption", lambda: by("corruption", "kind")),
        ("damage", "corruption", lambda: by("corruption", "damage")),
        ("inputs", "inputs", lambda: by("inputs", "kind")),
        ("repeat", "repeat", repeat),
    ):
        if (REPOSITORY / REPORTS / f"{source}.json").exists() and rows(source):
            text = text.replace("{" + name + "}", f"{make()}\n\n{extent(source)}")
        else:
            text = text.replace("{" + name + "}", "Not tried yet.")
    write_text(REPOSITORY / PAGE, text)


if __name__ == "__main__":
    main()
