from dataclasses import dataclass, field

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from autoplace.runtime.tree import Tree, shared_object


@dataclass
class Pair:
    left: object
    right: list = field(default_factory=list)


def test_takes_apart_and_rebuilds_nested_values():
    value = {"a": (1, None), "b": Pair(left=Pair(2), right=[3, {"c": 4}]), "d": [5]}
    tree = Tree(value)
    assert [x for x in tree.leaves if x is not None] == [1, 2, 3, 4, 5]
    rebuilt = tree.build([x if x is None else x * 10 for x in tree.leaves])
    assert rebuilt == {"a": (10, None), "b": Pair(left=Pair(20), right=[30, {"c": 40}]), "d": [50]}
    assert value["b"].left.left == 2, "the pattern is left alone"


def test_model_outputs_keep_their_type():
    tree = Tree(BaseModelOutput(last_hidden_state=torch.ones(2)))
    rebuilt = tree.build([leaf * 2 for leaf in tree.leaves])
    assert type(rebuilt) is BaseModelOutput
    assert rebuilt.last_hidden_state.tolist() == [2, 2]


def test_structures_compare():
    assert Tree((1, Pair(2))).same_structure(Tree((3, Pair(4))))
    assert not Tree((1, Pair(2))).same_structure(Tree((3, 4)))
    assert not Tree(Pair([1])).same_structure(Tree(Pair([1, 2])))
    assert not Tree([1]).same_structure(Tree((1,)))


def filled_cache(rows):
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.full((rows, 1, 3, 2), float(layer)), torch.ones(rows, 1, 3, 2), layer)
    return cache


def test_objects_that_hold_tensors_are_taken_apart_on_request():
    cache = filled_cache(2)
    assert Tree((cache,)).leaves == [cache]
    tree = Tree((cache,), objects=True)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in tree.leaves) == 4
    (rebuilt,) = tree.build([leaf + 1 if isinstance(leaf, torch.Tensor) else leaf for leaf in tree.leaves])
    assert type(rebuilt) is DynamicCache and rebuilt is not cache
    assert rebuilt.layers[1].keys.unique().tolist() == [2] and rebuilt.get_seq_length() == 3
    assert cache.layers[1].keys.unique().tolist() == [1], "the pattern is left alone"
    assert tree.same_structure(Tree((filled_cache(4),), objects=True))
    assert not tree.same_structure(Tree((DynamicCache(),), objects=True))


def test_kept_objects_modules_and_circles_stay_whole():
    class Circle:
        def __init__(self):
            self.tensor, self.me = torch.ones(1), self

    cache, module, circle = filled_cache(1), torch.nn.Linear(2, 2), Circle()
    assert Tree([cache, module, circle], objects=True, keep=[cache]).leaves == [cache, module, circle]


def test_what_parts_of_a_batch_cannot_have_in_common():
    cache = DynamicCache()
    assert shared_object([None, 1, 2.0, "x", torch.float32, torch.ones(1), torch.Size([1]), len]) is None
    assert shared_object([1, cache, 2]) is cache
