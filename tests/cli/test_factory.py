"""Model factories: what is accepted, and one sentence for what is not."""

from __future__ import annotations

import pytest

from autoplace.cli.factory import load_workload
from autoplace.errors import ModelFactoryError

GOOD = """
import torch
def build():
    return torch.nn.Linear(4, 2).eval(), torch.zeros(3, 4)
def named():
    return torch.nn.Linear(4, 2).eval(), {"input": torch.zeros(3, 4)}
def raises():
    raise RuntimeError("no such weights")
def wrong():
    return 42
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "factory.py"
    path.write_text(GOOD)
    return path


def test_positional_and_keyword_inputs(factory):
    positional = load_workload(f"{factory}:build")
    named = load_workload(f"{factory}:named", training=True)
    assert positional.batch_size == 3 and positional.forward().shape == (3, 2)
    assert named.kwargs.keys() == {"input"} and named.training
    assert not positional.training


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{path}", "write it as file.py:function"),
        ("{path}:missing", "has no function"),
        ("{path}:raises", "raised RuntimeError: no such weights"),
        ("{path}:wrong", "must return"),
        ("nowhere.py:build", "does not exist"),
    ],
)
def test_bad_factories_get_one_sentence(factory, spec, message):
    with pytest.raises(ModelFactoryError, match=message):
        load_workload(spec.format(path=factory))


def test_a_file_that_does_not_import(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def build(:\n")
    with pytest.raises(ModelFactoryError, match="cannot be imported"):
        load_workload(f"{path}:build")
