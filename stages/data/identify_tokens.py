"""Writes what identifies the tokens of one corpus that DWR is trained or validated on.

    python stages/data/identify_tokens.py docs

Training depends on the folder of these files: `deps` in dvc.yaml cannot loop over dwr.also_validate_on, and depending
on the tokens of all corpora would rerun it too often.

Reads   data/tokens/NAME
Writes  data/dwr/tokens/NAME.json  SHA-256 of its metadata, which hold those of its shards, and of its tokenizer
"""

from pathlib import Path

from dynaroute.config import Settings
from dynaroute.pipeline.artifacts import sha256, write_json
from dynaroute.pipeline.stage import run


def main(settings: Settings, name: str) -> None:
    """Writes the file of one corpus."""
    tokens = Path("data/tokens") / name
    files = [tokens / "metadata.json", *sorted((tokens / "tokenizer").glob("*"))]
    write_json(
        Path("data/dwr/tokens") / f"{name}.json", {str(path.relative_to(tokens)): sha256(path) for path in files}
    )


if __name__ == "__main__":
    run(main, __doc__, "name")
