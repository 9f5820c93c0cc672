"""What the tests of reports share."""

import shutil
from pathlib import Path

import pytest
from dagformer_tree import write_comparisons, write_dagformer_tree
from dwr_tree import write_tree


@pytest.fixture(scope="session")
def pristine_dwr_tree(tmp_path_factory) -> Path:
    """Everything that the DWR reports read."""
    root = tmp_path_factory.mktemp("dwr")
    write_tree(root)
    return root


@pytest.fixture
def tree(pristine_dwr_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of that."""
    shutil.copytree(pristine_dwr_tree, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def pristine_dagformer_tree(tmp_path_factory) -> Path:
    """Everything that the DAGFormer reports read."""
    root = tmp_path_factory.mktemp("dagformer")
    write_dagformer_tree(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_comparisons()
    return root


@pytest.fixture
def dagformer_tree(pristine_dagformer_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of that."""
    shutil.copytree(pristine_dagformer_tree, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
