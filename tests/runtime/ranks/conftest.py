"""Groups of ranks that the tests of this folder share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


Ranks = _module("ranks").Ranks


def _group(count):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    group = Ranks(count)
    yield group
    group.close()


@pytest.fixture(scope="session")
def two_ranks():
    yield from _group(2)


@pytest.fixture(scope="session")
def three_ranks():
    yield from _group(3)


@pytest.fixture(scope="session")
def ranks_of():
    """Return what makes a group of its own, for tests that end ranks."""
    return Ranks


@pytest.fixture(scope="session")
def jobs():
    return _module("jobs")
