import torch
from torch import nn

from autoplace.costs.calls import GroupIndex, captured_calls, marked_runs


def test_runs_map_to_numbered_groups():
    index = GroupIndex(["a", "b", "a#1", "c+d"])
    assert index.assign(["a", "a", "b", "a", "c", "d", "c"]) == [0, 0, 1, 2, 3, 3, 3]
    assert index.assign(["a", "b", "a", "b", "a"]) == [0, 1, 2, 1, 2]  # more runs than groups: the last one


def test_root_group_is_the_whole_model():
    model = nn.Linear(2, 2)
    index = GroupIndex(["."])
    assert list(index.modules(model)) == [("", model)]


def test_stretches_follow_the_execution_and_hooks_go_away():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    index, clock = GroupIndex(["0", "1.1"]), iter(range(100))
    with marked_runs(model, index, lambda: next(clock)) as runs:
        model(torch.ones(1, 2))
    assert [tuple(run) for run in runs] == [("0", False, 0), ("0", True, 1), ("1.1", False, 2), ("1.1", True, 3)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_shared_module_inside_another_gets_its_own_stretch():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, Outer(inner))
    with marked_runs(model, GroupIndex(["0", "1", "0#1"]), lambda: 0) as runs:
        model(torch.ones(1, 2))
    assert [(r.path, r.glue) for r in runs] == [
        ("0", False), ("0", True), ("1", False), ("0", False), ("1", False), ("1", True),
    ]  # fmt: skip


def test_calls_are_captured_with_their_detached_inputs():
    class Keyworded(nn.Module):
        def forward(self, x, *, factor):
            return x * factor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Keyworded()

        def forward(self, x):
            return self.a(x, factor=2) + self.a(x + 1, factor=3)

    model, x = Model(), torch.ones(2, requires_grad=True)
    with captured_calls(model, GroupIndex(["a"])) as calls:
        model(x)
    assert [(c.path, c.args[0].tolist(), c.kwargs) for c in calls] == [
        ("a", [1, 1], {"factor": 2}),
        ("a", [2, 2], {"factor": 3}),
    ]
    assert not calls[1].args[0].requires_grad
