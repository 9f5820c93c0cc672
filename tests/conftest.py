"""What several test modules share."""

from pathlib import Path

import pytest
from repository import SHARED_DATA


@pytest.fixture
def shared_data() -> Path:
    """Real text and the GPT-2 tokenizer files, which are kept outside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data in {SHARED_DATA}, which is not part of the repository")
    return SHARED_DATA
