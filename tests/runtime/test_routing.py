import copy
import pickle

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.runtime import build_executor
from autoplace.runtime.routing import Gate, install, remove, resolve, routed

A, B = "host0/cpu:0", "host0/cpu:1"


def model():
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2), nn.Linear(2, 2))


def paths(targets):
    return {t.path: t.calls for t in targets}


def test_the_largest_modules_on_one_device_are_sent(cluster):
    net = model()
    assert paths(resolve(net, {"0.0": A, "0.1": A, "1": B, "2": A}, cluster)) == {
        "0": {0: A},
        "1": {0: B},
        "2": {0: A},
    }
    assert paths(resolve(net, {"0.0": A, "0.1": A, "1": A, "2": A}, cluster)) == {"": {0: A}}
    assert paths(resolve(net, {"0.0": A, "0.1": B, "1": B}, cluster)) == {
        "0.0": {0: A},
        "0.1": {0: B},
        "1": {0: B},
    }
    assert paths(resolve(net, {".": B}, cluster)) == {"": {0: B}}


def test_planner_names_are_ignored_and_further_calls_may_go_elsewhere(cluster):
    targets = resolve(model(), {"0": A, "0~backward": B, "~loss": B, "1": A, "1#1": B, "1#1~backward": A}, cluster)
    assert paths(targets) == {"0": {0: A}, "1": {0: A, 1: B}}
    (target,) = [t for t in targets if t.path == "1"]
    assert [target.device(i) for i in range(3)] == [A, B, A]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({"0": A, "nope": B}, "'nope', which the model does not have"),
        ({"0#x": A}, "'0#x'"),
        ({"0": "host0/cpu:7"}, "'host0/cpu:7', which the cluster does not have"),
        ({"~loss": A}, "places no module"),
        ({"0": A, "0.1": B}, "both '0' and '0.1'"),
    ],
)
def test_plans_that_do_not_fit(cluster, assignment, words):
    with pytest.raises(ExecutionError, match=words):
        resolve(model(), assignment, cluster)


def test_one_module_under_two_names(cluster):
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(ExecutionError, match="one module"):
        resolve(net, {"0": A, "1": A, "2": B}, cluster)


def test_gates_pass_through_without_a_route_and_go_after_the_last_user():
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = layer(x)
    install(layer)
    install(layer)
    assert isinstance(vars(layer)["forward"], Gate)
    assert torch.equal(layer(x), expected)
    remove(layer)
    assert "forward" in vars(layer)
    remove(layer)
    assert "forward" not in vars(layer)
    remove(layer)


def test_an_instance_forward_is_given_back():
    layer = nn.Linear(2, 2)
    own = layer.forward = lambda x: x + 1
    install(layer)
    assert layer(1) == 2
    remove(layer)
    assert layer.forward is own


def test_routes_hold_in_their_thread_and_count_calls():
    layer = nn.Linear(2, 2)
    install(layer)
    seen = []

    class Target:
        module = layer

        @staticmethod
        def device(call):
            return f"d{call}"

    def dispatch(device, module, function, args, kwargs):
        seen.append(device)
        return function(*args, **kwargs)

    with routed({id(layer): Target}, dispatch):
        layer(torch.ones(1, 2))
        layer(torch.ones(1, 2))
    layer(torch.ones(1, 2))
    remove(layer)
    assert seen == ["d0", "d1"]


def test_a_gated_model_can_be_copied_and_pickled(cluster, make_plan):
    net = model()
    x = torch.ones(3, 2)
    with build_executor(net, make_plan({"0": A, "1": B, "2": A}), cluster):
        twin, stored = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        expected = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(twin(x), expected)
    assert torch.equal(stored(x), expected)


def test_a_module_list_is_never_sent_but_what_it_holds_is(cluster):
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model.head = torch.nn.Linear(2, 2)
    targets = resolve(model, {"blocks.0": A, "blocks.1": A, "head": B}, cluster)
    assert {t.path: t.device(0) for t in targets} == {"blocks.0": A, "blocks.1": A, "head": B}


def test_a_merged_group_places_every_module_in_its_name(cluster):
    model = torch.nn.Module()
    model.h = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    targets = resolve(model, {"h.0+h.1": A, "h.2": B}, cluster)
    assert {t.path: t.device(0) for t in targets} == {"h.0": A, "h.1": A, "h.2": B}
