"""A workload runs what it is given, in its own mode."""

from __future__ import annotations

import torch

from autoplace import Workload


class Sized(torch.nn.Linear):
    """Callable, and false in a condition."""

    def __len__(self):
        return 0


def test_a_callable_of_length_nought_is_called():
    model, other = torch.nn.Linear(2, 3), Sized(2, 3)
    x = torch.ones(1, 2)
    output = Workload(model=model, args=(x,)).forward(other)
    torch.testing.assert_close(output, other(x))


def test_training_leaves_gradients_and_the_flags_are_put_back():
    model = torch.nn.Linear(2, 3).eval()
    workload = Workload(model=model, args=(torch.ones(1, 2),), training=True)
    with workload.mode():
        assert model.training
        workload.step()
    assert model.weight.grad is not None and not model.training
