"""Keys, parameters, ties, buffers and attributes are the model's own."""

from __future__ import annotations

import copy

import pytest
import torch

from autoplace import OptimizedParallel, Plan


def test_state_dict_has_the_models_keys_shapes_and_order(wrap, net, shape):
    plain = copy.deepcopy(net)
    wrapper = wrap(net, shape)
    for _ in range(2):  # before and after the first call
        state = wrapper.state_dict()
        assert list(state) == list(plain.state_dict())
        assert [v.shape for v in state.values()] == [v.shape for v in plain.state_dict().values()]
        wrapper(torch.randn(8, 8))


def test_states_are_loadable_both_ways(wrap, net, shape):
    wrapper, other = wrap(net, shape), type(net)()
    x = torch.randn(8, 8)
    wrapper(x)
    assert wrapper.load_state_dict(other.state_dict()).missing_keys == []
    torch.testing.assert_close(wrapper(x), other(x))
    third = type(net)()
    third.load_state_dict(wrapper.state_dict())
    torch.testing.assert_close(third(x), wrapper(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapper.load_state_dict({})


def test_as_a_child_it_adds_nothing_to_the_keys(wrap, net):
    plain = torch.nn.Sequential(copy.deepcopy(net), torch.nn.BatchNorm1d(4))
    holder = torch.nn.Sequential(wrap(net), torch.nn.BatchNorm1d(4))
    assert list(holder.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in holder.named_modules()] == [n for n, _ in plain.named_modules()]
    holder.load_state_dict(plain.state_dict())
    x = torch.randn(8, 8)
    torch.testing.assert_close(holder(x), plain(x))


def test_parameters_are_the_same_objects_before_and_after(wrap, net, shape):
    before = [id(p) for p in net.parameters()]
    wrapper = wrap(net, shape)
    assert [id(p) for p in wrapper.parameters()] == before
    wrapper(torch.randn(8, 8)).sum().backward()
    assert [id(p) for p in wrapper.parameters()] == before == [id(p) for p in net.parameters()]
    assert [n for n, _ in wrapper.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert list(wrapper.modules()) == list(net.modules()), "the model itself is the first of its modules"


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizer_made_before_or_after_wrapping_works(wrap, net, shape, when):
    plain = copy.deepcopy(net)
    if when == "before":
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        wrapper = wrap(net, shape)
    else:
        wrapper = wrap(net, shape)
        optimizer = torch.optim.AdamW(wrapper.parameters(), lr=0.01)
    other = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for _ in range(3):
        x = torch.randn(8, 8)
        for call, opt in ((wrapper, optimizer), (plain, other)):
            opt.zero_grad()
            call(x).square().mean().backward()
            opt.step()
    for mine, theirs in zip(wrapper.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Tied(torch.nn.Module):
    """An embedding and a head that are one parameter, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.layer = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.layer(torch.tanh(self.layer(x))))


def test_tied_weights_are_one_parameter_with_the_summed_gradient(wrap, same_step, shape):
    model = Tied()
    wrapper = wrap(model, shape)
    assert sum(p is model.embed.weight for p in wrapper.parameters()) == 1
    same_step(wrapper, torch.randint(0, 11, (8, 5)))
    assert model.head.weight is model.embed.weight is wrapper.embed.weight
    state = copy.deepcopy(wrapper.state_dict())
    wrapper.load_state_dict(state)
    assert model.head.weight is model.embed.weight


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(2, 4, 3)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("shape", ["plain", "single", "stages"])
def test_batch_norm_counts_as_in_the_plain_run(wrap, same_step, strict, shape):
    model = Normed()
    wrapper = wrap(model, shape)
    for _ in range(3):
        twin = same_step(wrapper, torch.randn(8, 2, 6))
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)
    assert model.norm.num_batches_tracked == 3


@pytest.mark.parametrize("shape", ["replicas", "pipeline"])
def test_parts_of_a_batch_are_refused_where_the_model_needs_its_statistics(wrap, same_step, shape):
    model = Normed()
    wrapper = wrap(model, shape)
    with pytest.warns(UserWarning, match="BatchNorm1d computes statistics over the whole batch"):
        twin = same_step(wrapper, torch.randn(8, 2, 6))
    assert wrapper.plan.is_plain and model.norm.num_batches_tracked == 1
    torch.testing.assert_close(model.norm.running_var, twin.norm.running_var)
    wrapper.eval()
    with torch.no_grad():
        wrapper(torch.randn(8, 2, 6))
        assert wrapper.plan.shape in ("replicas", "stages"), "in eval() the statistics are fixed"


def test_attributes_are_set_read_and_deleted_on_the_model(wrap, net, shape):
    wrapper = wrap(net, shape)
    x = torch.randn(8, 8)
    expected = net(x)
    wrapper(x)
    wrapper.scale = 3.0
    assert net.scale == 3.0
    torch.testing.assert_close(wrapper(x), 3.0 * expected)
    net.note = "said"
    assert wrapper.note == "said" and "note" in dir(wrapper) and vars(wrapper) is vars(net)
    del wrapper.note
    assert not hasattr(net, "note") and not hasattr(wrapper, "note")
    assert wrapper.width == 16
    with pytest.raises(ValueError, match="cannot become 9 wide"):
        wrapper.width = 9
    assert wrapper.training is net.training
    net.eval()
    assert wrapper.training is False


def test_parameters_modules_and_buffers_set_on_the_wrapper_are_the_models(wrap, net):
    wrapper = wrap(net)
    wrapper.first.weight = torch.nn.Parameter(torch.zeros(16, 8))
    wrapper.extra = torch.nn.Linear(2, 2)
    wrapper.register_buffer("mean", torch.ones(3))
    wrapper.own = torch.nn.Parameter(torch.ones(1))
    assert net.extra is wrapper.extra and net.mean is wrapper.mean and net.own is wrapper.own
    assert {"extra.weight", "mean", "own"} <= set(net.state_dict())


def test_methods_that_return_the_model_return_the_wrapper(wrap, net):
    wrapper = wrap(net)
    assert wrapper.train() is wrapper and wrapper.eval() is wrapper and wrapper.requires_grad_(False) is wrapper
    assert wrapper.apply(lambda m: None) is wrapper and not any(p.requires_grad for p in net.parameters())
    sequence = wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert sequence.append(torch.nn.ReLU()) is sequence and len(sequence) == 2


def test_wrapping_twice_wraps_once(net):
    inner = OptimizedParallel(net, plan=Plan.plain())
    outer = OptimizedParallel(inner, plan=Plan.plain())
    assert outer._state.model is net and list(outer.state_dict()) == list(net.state_dict())


def test_a_module_replaced_under_a_plan_gets_its_gradients(wrap, net, same_step, shape):
    wrapper = wrap(net, shape)
    same_step(wrapper, torch.randn(8, 8))
    net.first = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16))
    if shape == "plain":
        same_step(wrapper, torch.randn(8, 8))
        return
    with pytest.warns(UserWarning, match="were replaced since it was planned"):
        same_step(wrapper, torch.randn(8, 8))
