"""A workload runs what it is given, in its own mode."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from autoplace import Workload
from autoplace.workload import default_loss


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


def test_the_loss_of_an_output_is_an_attribute_or_a_key_and_else_a_mean_square():
    loss, scores = torch.tensor(3.0, requires_grad=True), torch.full((4, 2), 2.0, requires_grad=True)
    assert default_loss({"loss": loss, "logits": scores}) is loss
    assert default_loss(SimpleNamespace(loss=loss, logits=scores)) is loss
    assert default_loss({"logits": scores}).item() == 4.0
    assert default_loss({"loss": scores, "logits": scores}).item() == 8.0, "what is no scalar is a tensor like others"
