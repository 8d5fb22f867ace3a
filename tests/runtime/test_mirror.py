import copy

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.runtime.mirror import Mirror, apply_changes


class Config:
    def __init__(self):
        self.drop = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.lin = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.drop.config = self.config
        self.name = None
        self.register_buffer("table", torch.arange(4))


@pytest.fixture
def pair():
    """A model in eval mode, its mirror, and a copy that follows."""
    model = Net().eval()
    mirror = Mirror(model)
    twin = copy.deepcopy(model)

    def follow(**how):
        changes, values = mirror.changes(**how)
        apply_changes(twin, changes, values)
        return changes

    follow(everything=True)
    return model, twin, follow


def test_nothing_is_sent_when_nothing_changed(pair):
    _, _, follow = pair
    changes = follow()
    assert changes.attributes == [] and changes.requires_grad is None and changes.buffers == []


def test_flags_attributes_and_configs_follow(pair):
    model, twin, follow = pair
    model.norm.train()
    model.drop.p, model.name, model.config.drop = 0.25, "x", 0.0
    follow()
    assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]
    assert twin.drop.p == 0.25 and twin.name == "x" and twin.config.drop == 0.0
    assert twin.drop.config is twin.config
    model.name = None
    follow()
    assert twin.name is None


def test_gradient_flags_follow(pair):
    model, twin, follow = pair
    model.lin.weight.requires_grad_(False)
    assert follow().requires_grad is not None
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


def test_buffers_follow_also_where_batch_norm_changed_them(pair):
    model, twin, follow = pair
    with torch.no_grad():
        model.table.add_(1)
    assert len(follow().buffers) == 1 and torch.equal(twin.table, model.table)
    model.train()
    follow()
    model.norm(torch.randn(8, 2))
    follow()
    assert torch.equal(twin.norm.running_mean, model.norm.running_mean)
    model.eval()
    model.table = torch.arange(6)
    follow()
    assert torch.equal(twin.table, model.table)


def test_buffers_that_graphs_hold_keep_their_version(pair):
    model, twin, follow = pair
    before = twin.norm.running_mean._version
    model.train()
    follow()
    assert twin.norm.running_mean._version == before


def test_everything_is_sent_when_asked(pair):
    model, twin, follow = pair
    twin.train()
    twin.requires_grad_(False)
    twin.table.zero_()
    follow(everything=True)
    assert not twin.training and twin.lin.weight.requires_grad and torch.equal(twin.table, model.table)


def test_what_cannot_be_followed_is_refused(pair):
    model, _, follow = pair
    model.name = object()
    with pytest.raises(ExecutionError, match="'name'"):
        follow()
    model.name = None
    weight, model.lin.weight = model.lin.weight, nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ExecutionError, match="replaced"):
        follow()
    model.lin.weight = weight
    handle = model.lin.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ExecutionError, match="hook"):
        follow()
    handle.remove()
    follow()
