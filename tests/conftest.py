"""Keeps every test's caches, records and MLflow store out of the user's folders, and PyTorch on one thread."""

from __future__ import annotations

import pytest
import torch


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
