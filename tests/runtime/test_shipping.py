import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.runtime import build_executor
from autoplace.runtime.processes import ProcessReplicas
from autoplace.runtime.shipping import dump, load, receive_model, ship_model, supported

A, B = "host0/cpu:0", "host0/cpu:1"


def sent(model):
    """The model as another process would have it."""
    shipment = ship_model(model)
    return receive_model(replace(shipment, storages=tuple((os.dup(fd), size) for fd, size in shipment.storages)))


def test_parameters_are_shared_and_buffers_are_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias = nn.Parameter(model[0].weight.data[0])  # a view of another parameter
    model[0].weight.requires_grad_(False)
    twin = sent(model)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
        model[1].running_mean.fill_(7.0)
    assert twin[0].weight.eq(7.0).all() and twin[0].bias.eq(7.0).all()
    assert twin[1].running_mean.eq(0.0).all()
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


def test_ties_and_further_views_stay_what_they_are():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model.view = model["a"].bias.data[:1]
    twin = sent(model)
    assert twin["a"].weight is twin["b"].weight
    with torch.no_grad():
        model["a"].bias.fill_(3.0)
    assert twin.view.item() == 3.0


def test_gates_of_other_plans_stay_behind(cluster, make_plan):
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    with build_executor(model, make_plan({"0": A, "1": B}), cluster):
        twin = sent(model)
        assert "forward" in vars(model[0]) and "forward" not in vars(twin[0])
    assert torch.equal(twin(x), model(x))


def test_structures_come_back_with_their_tensors():
    shared = torch.ones(2)
    value = {"a": (shared, [1, "x", None]), "b": shared, "c": torch.zeros(1)}
    structure, tensors = dump(value, [value["c"]])
    assert tensors[0] is value["c"] and len(tensors) == 2, "each tensor once, the known ones first"
    got = load(structure, [torch.full((1,), 5.0), torch.full((2,), 6.0)])
    assert got["a"][1] == [1, "x", None] and got["a"][0] is got["b"] and got["c"].item() == 5.0
    with pytest.raises(ExecutionError, match="pickled"):
        dump({"f": lambda: None})


def test_too_little_shared_memory_or_too_few_files_are_refused_before_anything_moves(monkeypatch):
    model = nn.Linear(100, 100)
    real = os.statvfs("/dev/shm")
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real[:4], 1, *real[5:])))
    assert "MiB free" in supported(model)
    monkeypatch.undo()
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 64))
    assert "ulimit -n" in supported(model)
    assert not model.weight.is_shared()


def test_models_that_do_not_travel_are_refused_with_a_reason(cluster, make_plan):
    def with_(**attributes):
        net = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(net, name, value)
        return net

    main = type("Mine", (nn.Linear,), {"__module__": "__main__"})
    hooked, sparse = nn.Linear(2, 2), nn.Module()
    hooked.register_forward_hook(lambda *_: None)
    sparse.register_buffer("s", torch.eye(2).to_sparse())
    for model, words in [
        (with_(fn=lambda x: x), "pickled"),
        (main(2, 2), "main file"),
        (hooked, "hooks"),
        (with_(forward=abs), "forward"),
        (sparse, "layout"),
        (torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "TorchScript"),
        (with_(other=[torch.ones(1, requires_grad=True)]), "requires a gradient"),
        (nn.Linear(2, 2, device="meta"), "meta"),
    ]:
        assert words in supported(model)
        with pytest.raises(ExecutionError, match=words):
            ProcessReplicas(model, make_plan(A, B, engine="processes"), cluster)
    fine = nn.Linear(2, 2)
    assert supported(fine) == "" and not fine.weight.is_shared(), "asking moves nothing"


def test_a_model_that_cannot_be_imported_there_is_refused(cluster, make_plan, tmp_path, monkeypatch):
    (tmp_path / "vanishing.py").write_text("import torch\n\n\nclass Gone(torch.nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import vanishing

    (tmp_path / "vanishing.py").unlink()
    with pytest.raises(ExecutionError, match=r"rebuild the model.*vanishing"):
        ProcessReplicas(vanishing.Gone(2, 2), make_plan(A, B, engine="processes"), cluster)
