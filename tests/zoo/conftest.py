"""One MLflow store for all tests of the zoo, because each new one takes seconds; a data directory per test."""

import numpy as np
import pytest

from autoplace.policy.store import write_policy
from autoplace.zoo.tracking import ensure_store


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('a store') / 'mlflow.db'}"
    ensure_store(uri)
    return uri


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOPLACE_DATA_DIR", str(tmp_path / "data"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data"


@pytest.fixture
def policy_dir(tmp_path):
    tensors = {"scorer.weight": np.ones((2, 3), np.float32)}
    card = "# Small\n\nPlaces small things. Nothing else.\n"
    return write_policy(tmp_path / "small", tensors, {"hidden": 3}, card, {"ratio": 0.97})
