import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoplace.errors import InputError
from autoplace.graph.capture import capture
from autoplace.graph.coarsen import coarsen, group_modules
from autoplace.graph.opgraph import OpGraph
from autoplace.workload import Workload


def chain(modules, flops=None, weights=None, **options):
    count = len(modules)
    return OpGraph.build(
        names=[f"op{i}" for i in range(count)],
        edges=[(i, [i + 1], 4.0) for i in range(count - 1)],
        modules=modules,
        flops=flops or [1.0] * count,
        weight_bytes=weights or [1] * count,
        **options,
    )


@st.composite
def graphs(draw):
    """Random module trees, executed in random order, with random forward edges."""
    paths = draw(st.lists(st.lists(st.sampled_from(["a", "b", "0", "1"]), max_size=4), min_size=1, max_size=6))
    modules = [".".join(p) for p in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=40))]
    count = len(modules)
    edges = []
    for producer in range(count - 1):
        later = st.integers(producer + 1, count - 1)
        if consumers := draw(st.lists(later, max_size=3)):
            edges.append((producer, consumers, float(draw(st.integers(1, 9)))))
    return OpGraph.build(
        names=[str(i) for i in range(count)],
        edges=edges,
        modules=modules,
        flops=[float(draw(st.integers(0, 100))) for _ in range(count)],
        weight_bytes=[draw(st.integers(0, 3)) for _ in range(count)],
        activation_bytes=[1] * count,
        colocate=[draw(st.sampled_from([-1, -1, -1, 0, 1])) for _ in range(count)],
    )


@settings(max_examples=150, deadline=None)
@given(graph=graphs(), max_groups=st.integers(1, 12), fraction=st.sampled_from([0.0, 0.05, 0.3]))
def test_any_grouping_is_a_graph_of_intervals(graph, max_groups, fraction):
    grouping = coarsen(graph, max_groups=max_groups, min_cost_fraction=fraction)  # raises on a cycle
    coarse, group_of = grouping.graph, grouping.group_of
    assert coarse.num_ops <= max_groups
    assert (np.diff(group_of) >= 0).all() and set(group_of) == set(range(coarse.num_ops))
    for field in ("flops", "weight_bytes", "activation_bytes"):
        assert getattr(coarse, field).sum() == getattr(graph, field).sum()
    assert len(set(coarse.names)) == coarse.num_ops
    crossing = {(int(group_of[p]), int(group_of[c])) for p, c, _ in graph.edge_list if group_of[p] != group_of[c]}
    assert crossing == {(int(p), int(c)) for p, c, _ in coarse.edge_list}
    for key in set(graph.colocate[graph.colocate >= 0]):
        groups = np.unique(group_of[graph.colocate == key])
        ids = set(coarse.colocate[groups])
        assert len(groups) == 1 or (len(ids) == 1 and -1 not in ids)


@settings(max_examples=100, deadline=None)
@given(graph=graphs())
def test_cut_modules_are_an_antichain(graph):
    paths = {p for name in coarsen(graph, min_cost_fraction=0.0).graph.names for p in group_modules(name)}
    assert not any(a != b and (not b or a.startswith(b + ".")) for a in paths for b in paths)


def test_runs_of_one_module_are_numbered_and_co_located():
    grouping = coarsen(chain(["a", "b", "a", "b", "a"]), min_cost_fraction=0.0)
    assert grouping.graph.names == ("a", "b", "a#1", "b#1", "a#2")
    assert grouping.graph.modules == ("a", "b", "a", "b", "a")
    assert grouping.graph.colocate.tolist() == [0, 1, 0, 1, 0]


def test_glue_joins_the_run_before_it():
    grouping = coarsen(chain(["", "a", "", "a", "", "b", ""]), min_cost_fraction=0.0)
    assert grouping.graph.names == ("a", "b")
    assert grouping.group_of.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert grouping.graph.flops.tolist() == [5.0, 2.0]


def test_tensors_go_once_to_a_group():
    graph = OpGraph.build(
        names=["x", "y", "z", "w"], modules=["a", "b", "b", "c"], flops=[1.0] * 4, weight_bytes=[1] * 4,
        edges=[(0, [1, 2, 3], 8.0), (1, [2], 4.0)],
    )  # fmt: skip
    coarse = coarsen(graph, min_cost_fraction=0.0).graph
    assert coarse.tensor_bytes.tolist() == [8.0]
    assert coarse.edge_list[:, :2].tolist() == [[0, 1], [0, 2]]


def test_containers_are_never_groups():
    modules = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    guessed = coarsen(chain(modules), min_cost_fraction=0.6).graph
    assert guessed.names == ("layers.0", "layers.1")
    told = coarsen(chain(modules), min_cost_fraction=0.6, called={"", *modules}).graph
    assert told.names == tuple(modules)


def test_cheap_modules_without_weights_are_glue():
    graph = chain(["a", "act", "b"], flops=[100.0, 1.0, 100.0], weights=[4, 0, 4])
    assert coarsen(graph, min_cost_fraction=0.1).graph.names == ("a", "b")
    assert coarsen(graph, min_cost_fraction=0.0).graph.names == ("a", "act", "b")


def test_a_module_that_is_almost_one_child_stays_whole():
    graph = chain(["a.dense", "a", "b.dense", "b"], flops=[100.0, 1.0, 100.0, 1.0])
    assert coarsen(graph).graph.names == ("a", "b")


def test_too_many_runs_are_merged_under_their_parent():
    modules = [f"h.{i}.{part}" for i in range(6) for part in ("x", "y")]
    graph = coarsen(chain(modules), max_groups=3, min_cost_fraction=0.0, called={"", *modules}).graph
    assert [group_modules(name) for name in graph.names] == [tuple(modules[i : i + 4]) for i in (0, 4, 8)]
    graph = coarsen(chain(modules), max_groups=6, min_cost_fraction=0.0).graph
    assert graph.names == tuple(f"h.{i}" for i in range(6))


@pytest.mark.parametrize("modules", [[""] * 5, ["a"] * 5])
def test_a_graph_of_one_module_is_one_group(modules):
    grouping = coarsen(chain(modules), max_groups=4)
    assert grouping.graph.num_ops == 1 and grouping.graph.num_tensors == 0
    assert grouping.graph.names == (".",)


def test_a_module_called_again_and_again_is_not_divided_beyond_the_limit():
    graph = chain(["layer.x", "layer.y", "layer"] * 5 + ["head"])
    few = coarsen(graph, max_groups=8, min_cost_fraction=0.0).graph
    assert few.names == ("layer", "head")
    many = coarsen(graph, max_groups=20, min_cost_fraction=0.0).graph
    assert many.names[:4] == ("layer.x", "layer.y", "layer.x#1", "layer.y#1") and many.num_ops == 11


def test_max_groups_must_be_positive():
    with pytest.raises(InputError, match="use 1 or more"):
        coarsen(chain(["a"]), max_groups=0)


@pytest.mark.parametrize(("name", "paths"), [(".", ("",)), ("a.b#2", ("a.b",)), ("a+b#1", ("a", "b"))])
def test_names_can_be_read_back(name, paths):
    assert group_modules(name) == paths


def test_a_twelve_layer_encoder_gives_a_few_dozen_groups():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=12, num_attention_heads=2, intermediate_size=256
    )
    model = transformers.BertModel(config)
    captured = capture(Workload(model=model, kwargs={"input_ids": torch.zeros(2, 32, dtype=torch.long)}))
    coarse = coarsen(captured.graph, called=captured.called).graph
    assert 30 <= coarse.num_ops <= 100
    assert set(coarse.modules) <= captured.called
    assert all(f"encoder.layer.{i}." in " ".join(coarse.names) for i in range(12))
