"""Keeps every test's caches, records and MLflow store out of the user's folders, and PyTorch on one thread.

Says which tests may run beside others (`beside`): those that calculate. The rest time things, or start processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
_BESIDE = {
    "agents", "envs", "graph", "policy", "simulate", "strategies", "test_bench_placement.py", "test_jit.py",
    "test_problem.py", "test_problem_columns.py", "test_problem_file.py",
}  # fmt: skip
"""Folders and files."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.relative_to(_HERE).parts[0] in _BESIDE:
            item.add_marker("beside")


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOPLACE_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setenv("AUTOPLACE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
