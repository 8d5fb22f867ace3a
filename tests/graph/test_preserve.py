import random

import numpy as np
import torch
from torch import nn

from autoplace.graph.preserve import preserve_model, preserve_random


class Messy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros(()))
        self.seen = None

    def forward(self, x):
        self.count = self.count + 1
        self.seen = x
        self.fresh = x
        return self.norm(x)


def test_buffers_attributes_and_gradients_come_back():
    model = Messy()
    count, mean = model.count, model.norm.running_mean
    model.norm.weight.grad = torch.ones(2)
    with preserve_model(model):
        assert model.norm.weight.grad is None
        model(torch.randn(4, 2)).sum().backward()
        assert model.count == 1 and not torch.equal(mean, torch.zeros(2))
    assert model.count is count and model.count == 0
    assert model.norm.running_mean is mean and torch.equal(mean, torch.zeros(2))
    assert model.norm.num_batches_tracked == 0
    assert model.seen is None and not hasattr(model, "fresh")
    assert torch.equal(model.norm.weight.grad, torch.ones(2)) and model.norm.bias.grad is None


def test_random_generators_come_back():
    with preserve_random():
        inside = (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: NPY002
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == inside  # noqa: NPY002


def test_it_restores_after_an_error():
    model = Messy()
    try:
        with preserve_model(model):
            model(torch.randn(4, 2))
            raise ValueError
    except ValueError:
        pass
    assert model.norm.num_batches_tracked == 0 and model.seen is None
