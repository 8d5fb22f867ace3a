import numpy as np
import pytest
import torch

from autoplace.agents.checkpoints import Checkpoint, Checkpoints
from autoplace.errors import InputError


def checkpoint(chunk):
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weights = {"w": np.full((2, 2), chunk, np.float32)}
    return Checkpoint(stage="imitate", chunk=chunk, weights=weights, best=weights, best_value=0.5,
                      optimizer=optimizer.state_dict(), updates=3, step=7)  # fmt: skip


def test_the_newest_comes_back_and_only_it_is_kept(tmp_path):
    store = Checkpoints(tmp_path / "c", {"seed": 1})
    assert store.latest() is None
    for chunk in (1, 2):
        store.save(checkpoint(chunk))
    found = store.latest()
    assert (found.stage, found.chunk, found.updates, found.step, found.best_value) == ("imitate", 2, 3, 7, 0.5)
    np.testing.assert_array_equal(found.weights["w"], np.full((2, 2), 2, np.float32))
    assert set(found.optimizer) == {"state", "param_groups"}
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["checkpoint-000002"]


def test_another_configuration_is_refused_by_name(tmp_path):
    Checkpoints(tmp_path, {"seed": 1}).save(checkpoint(1))
    with pytest.raises(InputError, match="seed = 1, not 2"):
        Checkpoints(tmp_path, {"seed": 2}).latest()


def test_damage_is_one_sentence(tmp_path):
    store = Checkpoints(tmp_path, {})
    store.save(checkpoint(1))
    (tmp_path / "checkpoint-000001" / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="damaged"):
        store.latest()


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_not_run(tmp_path, capsys):
    store = Checkpoints(tmp_path, {})
    store.save(checkpoint(1))
    torch.save(Bomb(), tmp_path / "checkpoint-000001" / "optimizer.pt")
    with pytest.raises(InputError, match="damaged"):
        store.latest()
    assert "executed" not in capsys.readouterr().out
