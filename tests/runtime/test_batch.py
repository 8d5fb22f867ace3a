import pytest
import torch

from autoplace.errors import ExecutionError
from autoplace.runtime.batch import CAT, MEAN, PASS, batch_size, join_kinds, largest_remainder, part_sizes
from autoplace.runtime.tree import Tree


@pytest.mark.parametrize(
    ("total", "shares", "sizes"),
    [
        (8, [0.5, 0.5], [4, 4]),
        (7, [0.5, 0.5], [4, 3]),
        (10, [0.72, 0.28], [7, 3]),
        (10, [0.1] * 10, [1] * 10),
        (5, [1 / 3] * 3, [2, 2, 1]),
        (3, [0.05, 0.95], [0, 3]),
    ],
)
def test_largest_remainder(total, shares, sizes):
    assert largest_remainder(total, shares) == sizes


def test_parts_are_microbatches_of_replicas(make_plan):
    plan = make_plan("host0/cpu:0", "host0/cpu:1", shares=[0.7, 0.3], microbatches=2)
    assert part_sizes(plan, 10) == [(0, 4), (0, 3), (1, 2), (1, 1)]


def test_parts_without_a_sample_are_left_out(make_plan):
    plan = make_plan("host0/cpu:0", "host0/cpu:1", shares=[0.7, 0.3], microbatches=2)
    assert part_sizes(plan, 3) == [(0, 1), (0, 1), (1, 1)]
    assert part_sizes(plan, 1) == [(0, 1)]
    assert part_sizes(make_plan("host0/cpu:0", "host0/cpu:1", shares=[0.05, 0.95]), 3) == [(1, 3)]
    assert part_sizes(plan, 0) == [(0, 0)]


def test_the_batch_is_the_first_tensor_with_a_dimension():
    assert batch_size([None, 3, torch.tensor(1.0), torch.ones(5, 2), torch.ones(4)]) == 5
    with pytest.raises(ExecutionError, match="no tensor"):
        batch_size([1, torch.tensor(2.0)])


def test_how_outputs_merge():
    one = Tree([torch.ones(2, 3), torch.tensor(1.0), "same", None, torch.tensor(4)])
    two = Tree([torch.ones(1, 3), torch.tensor(2.0), "same", None, torch.tensor(4)])
    assert join_kinds([one, two], [2, 1]) == [CAT, MEAN, PASS, PASS, PASS]


def test_samples_may_have_several_rows():
    assert join_kinds([Tree(torch.ones(6, 2)), Tree(torch.ones(3, 2))], [2, 1]) == [CAT]
    with pytest.raises(ExecutionError, match="no batch dimension"):
        join_kinds([Tree(torch.ones(6, 2)), Tree(torch.ones(4, 2))], [2, 1])
    with pytest.raises(ExecutionError, match="no batch dimension"):
        join_kinds([Tree(torch.ones(1, 2)), Tree(torch.ones(1, 2))], [2, 2])


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        ([torch.ones(5, 2)], [torch.ones(4, 2)], "no batch dimension"),
        (["a"], ["b"], "different outputs of type str"),
        ([1], [1, 2], "different structure"),
        ([torch.tensor(1)], [torch.tensor(2)], "no batch dimension"),
        ([object()], [object()], "use_cache"),
    ],
)
def test_what_does_not_merge(one, two, words):
    with pytest.raises(ExecutionError, match=words):
        join_kinds([Tree(one), Tree(two)], [2, 1])
