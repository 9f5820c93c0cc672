"""What several test modules share."""

import os
from pathlib import Path

import hypothesis
import pytest
from repository import SHARED_DATA

# The models here are tiny: more threads only wait for one another, which on a busy machine takes ten times as long.
# Set before torch is imported, and inherited by every process that a test starts. Stages set `num_threads` themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No time limit: on a busy machine any test may take long.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: side by side, workers then end together."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture
def shared_data() -> Path:
    """Real text and the GPT-2 tokenizer files, which are kept outside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data in {SHARED_DATA}, which is not part of the repository")
    return SHARED_DATA
