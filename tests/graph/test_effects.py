import pytest
import torch
from torch import nn

from autoplace.errors import CaptureError
from autoplace.graph.effects import bound_nodes, make_functional


def exported(forward, *inputs, training=False):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, *tensors):
            return forward(self, *tensors)

    program = torch.export.export(Net().train(training), inputs, strict=False)
    return program.graph


def targets(graph):
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def inputs_of(graph):
    return [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("tensors")]


def bound(graph):
    make_functional(graph)
    return [sorted(str(n.target) for n in nodes) for nodes in bound_nodes(graph, inputs_of(graph))]


X = torch.randn(4, 3)


def test_in_place_ops_that_nobody_sees_become_functional():
    def forward(net, x):
        y = x * 2
        y += 1
        y.relu_()
        return torch.nn.functional.gelu(y).mul_(3.0)

    graph = exported(forward, X)
    assert sum(t.partition(".default")[0].endswith("_") or "_.T" in t for t in targets(graph)) == 3
    make_functional(graph)
    assert targets(graph) == [
        "aten.mul.Tensor", "aten.add.Tensor", "aten.relu.default", "aten.gelu.default", "aten.mul.Tensor",
    ]  # fmt: skip


def test_in_place_ops_that_are_seen_stay_and_bind_what_sees_them():
    def forward(net, x):
        y = x * 2
        before = y.sum()
        view = y[:, 0]
        view.zero_()
        after = y.exp()
        return before, after

    (together,) = bound(exported(forward, X))
    assert "aten.zero_.default" in together and "aten.mul.Tensor" in together and "aten.sum.default" in together
    assert "aten.exp.default" not in together, "what reads after the last write may run anywhere"


def test_values_of_another_type_are_not_promoted():
    def forward(net, x):
        y = x.to(torch.float64, copy=True)
        z = torch.zeros_like(x)
        z.add_(y)
        z.eq_(0.0)
        return z

    graph = exported(forward, X)
    make_functional(graph)
    assert "aten.add_.Tensor" in targets(graph) and "aten.eq_.Scalar" in targets(graph)


@pytest.mark.parametrize("training", [False, True])
def test_running_statistics_are_written_in_training(training):
    graph = exported(lambda net, x: net.norm(net.norm(x)), X, training=training)
    found = bound(graph)
    if not training:
        assert found == []
        return
    assert ["aten.batch_norm.default"] * 2 in found, "two calls of one norm write one memory"
    assert ["aten.add_.Tensor"] * 2 in found


def test_dropout_in_eval_hands_back_its_input():
    def forward(net, x):
        y = x * 2
        z = net.drop(y)
        y[:, 0] = 1.0
        return z

    (together,) = bound(exported(forward, X))
    assert "aten.dropout.default" in together and "aten.mul.Tensor" in together


def test_blocks_write_what_is_written_in_them():
    def forward(net, x):
        y = x * 2
        with torch.autocast("cpu", enabled=False):
            z = y + 1
        with torch.no_grad():
            y[:, 0] = 3.0
        return y.exp(), z

    (together,) = bound(exported(forward, X))
    assert "wrap_with_set_grad_enabled" in together and "wrap_with_autocast" in together
    assert "aten.exp.default" not in together

    def harmless(net, x):
        with torch.autocast("cpu", enabled=False):
            return (x * 2).add_(1) + 1

    assert bound(exported(harmless, X)) == []


def test_inputs_that_are_written_are_refused():
    graph = exported(lambda net, x: x.add_(1), X)
    with pytest.raises(CaptureError, match="input in place"):
        bound(graph)


def test_buffers_bind_all_that_touches_them():
    def forward(net, x):
        a = net.count + x
        net.count.add_(1.0)
        return a, net.count * x

    (together,) = bound(exported(forward, X))
    assert together == ["aten.add.Tensor", "aten.add_.Tensor", "aten.mul.Tensor"]
