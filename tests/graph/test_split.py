import pytest
import torch
from torch import nn

from autoplace.errors import CaptureError
from autoplace.graph.export_flat import export_flat
from autoplace.graph.split import split
from autoplace.graph.tracing import modules_to_trace

PLACES = {"A": torch.device("cpu"), "B": torch.device("cpu")}


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        output = self.model(*tensors)
        return output if isinstance(output, tuple) else (output,)


def cut(model, devices, *inputs, batch=None):
    def device_of(modules):
        return next((devices[path] for path, _ in reversed(modules) if path in devices), None)

    return split(export_flat(Wrapped(model), inputs, batch=batch), device_of, PLACES, root="model")


def run(program, model, *inputs):
    """Run the stages one after another."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = dict(zip(program.inputs, inputs, strict=True))
    values.update({name: weights[path.removeprefix("model.")] for name, path in program.weights.items()})
    values.update(program.constants)
    values.update(zip(program.scalar_names, program.scalars(*inputs), strict=True))
    done = set()
    for i, stage in enumerate(program.stages):
        assert done.issuperset(stage.before)
        values.update(zip(stage.outputs, stage.module(*(values[name] for name in stage.inputs)), strict=True))
        done.add(i)
    return tuple(values[o] if isinstance(o, str) else o for o in program.outputs)


class Net(nn.Module):
    """A mask that nothing feeds, a branch, a tuple-valued op, a number from sizes, and a constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, y):
        mask = torch.ones(x.shape[1], 1).tril()
        left, right = self.a(x).chunk(2, -1)
        left = left + self.b(y) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.c(torch.sigmoid(left) * mask.mT) + right[:, :2].mean(), x.shape[0] * 2


def test_stages_compute_what_the_model_computes():
    net = Net()
    for devices in ({"a": "A", "b": "B", "c": "A"}, {"a": "B", "b": "A", "c": "A"}, {"a": "A", "b": "A", "c": "B"}):
        program = cut(net, devices, torch.randn(5, 4), torch.randn(5, 4), batch=5)
        assert {stage.device for stage in program.stages} == {"A", "B"}
        for size in (5, 3):
            x, y = torch.randn(size, 4), torch.randn(size, 4)
            assert program.accepts([x, y])
            got, expected = run(program, net, x, y), net(x, y)
            torch.testing.assert_close(got, expected)
        assert not program.accepts([x, torch.randn(4, 4)]) and not program.accepts([x[:, :3], y[:, :3]])
        assert not program.accepts([x[:1], y[:1]]) and not program.accepts([x.double(), y])


def test_glue_goes_where_it_is_needed():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(600, 300)

        def forward(self, x):
            bias = torch.arange(600.0) / 600
            return self.c(torch.cat([self.a(x), self.b(x)], -1) + bias)

    x = torch.randn(64, 300)
    for home in ("A", "B"):
        program = cut(Joined(), {"a": "A", "b": "B", "c": home}, x)
        *branches, join = [(s.device, s.label) for s in program.stages]
        assert sorted(branches) == [("A", "a"), ("B", "b")] and join == (home, "c")
        assert "cat" in program.stages[-1].module.code
        assert all(s.device == home for s in program.stages if "arange" in s.module.code)


def test_the_loss_is_where_the_scores_are_and_not_where_labels_are_first_touched():
    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)

        def forward(self, x, labels):
            scores = self.b(self.a(x))
            return nn.functional.cross_entropy(scores.view(-1, 300), labels.view(-1)), scores

    x, labels = torch.randn(64, 300), torch.randint(300, (64,))
    for first, last in (("A", "B"), ("B", "A")):
        program = cut(Scored(), {"a": first, "b": last}, x, labels)
        assert [stage.device for stage in program.stages] == [first, last]
        assert len(program.stages[0].outputs) == 1, "and nothing but the hidden values is handed over"


def test_a_shared_module_may_be_split_by_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(200, 200)

        def forward(self, x):
            return self.lin(torch.relu(self.lin(x)))

    def device_of(modules):
        return {0: "A", 1: "B"}.get(modules[-1][1]) if modules and modules[-1][0] == "lin" else None

    net, x = Twice(), torch.randn(100, 200)
    program = split(export_flat(Wrapped(net), [x], batch=None), device_of, PLACES, root="model")
    assert [s.device for s in program.stages] == ["A", "B"]
    torch.testing.assert_close(run(program, net, x)[0], net(x))


def test_guards_on_the_batch_hold():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x)) * (2.0 if x.shape[0] > 6 else 3.0)

    net = Picky()
    large = cut(net, {"a": "A", "b": "B"}, torch.randn(8, 2), batch=8)
    small = cut(net, {"a": "A", "b": "B"}, torch.randn(4, 2), batch=4)
    for size in range(2, 12):
        x = torch.randn(size, 2)
        program = large if large.accepts([x]) else small
        if program.accepts([x]):
            torch.testing.assert_close(run(program, net, x)[0], net(x))
    assert large.accepts([torch.randn(8, 2)]) and not large.accepts([torch.randn(5, 2)])
    assert small.accepts([torch.randn(4, 2)]) and not small.accepts([torch.randn(9, 2)])


def test_factory_operations_are_moved_to_the_stage():
    places = {"A": torch.device("cpu"), "B": torch.device("meta")}

    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                y = self.a(x) + torch.ones(3, device=x.device)
            return y * torch.arange(3, device="cpu")

    program = split(export_flat(Wrapped(Makes()), [torch.randn(2, 3)], batch=None), lambda _: "B", places, root="model")
    code = "".join(m.code for m in program.stages[0].module.modules() if isinstance(m, torch.fx.GraphModule))
    assert "device(type='meta')" in code and "device(type='cpu')" not in code


def test_what_cannot_be_cut_says_why():
    class Empty(nn.Module):
        def forward(self, x):
            return x

    class Replaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="no operation"):
        cut(Empty(), {}, torch.randn(2, 2))
    with pytest.raises(CaptureError, match="cannot be exported"):
        cut(Replaces(), {}, torch.randn(2, 2))


def test_an_export_that_cannot_keep_the_batch_free_fixes_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x)).reshape(2, 3, 2) if torch.compiler.is_exporting() else self.b(self.a(x))

    x = torch.randn(6, 2, requires_grad=True)
    program = cut(Fixed(), {"a": "A", "b": "B"}, x, batch=6)
    assert program.accepts([x]) and not program.accepts([torch.randn(4, 2)])
    assert not [name for name in vars(x) if "dynamo" in name]


def test_modules_to_trace_share_tensors_and_nothing_else():
    net = Net()
    with modules_to_trace(net) as copied:
        assert copied is not net and copied.a is not net.a
        assert all(p is q for p, q in zip(net.parameters(), copied.parameters(), strict=True))
        copied.a.mark = 1
    assert not hasattr(net.a, "mark")
    net.lock = __import__("threading").Lock()
    with modules_to_trace(net) as copied:
        assert copied is net
        net.mark = 1
    assert not hasattr(net, "mark")
