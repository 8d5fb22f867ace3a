from dataclasses import dataclass, field

import torch
from transformers.modeling_outputs import BaseModelOutput

from autoplace.runtime.tree import Tree


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
