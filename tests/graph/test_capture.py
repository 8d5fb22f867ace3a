import pytest
import torch
from torch import nn

from autoplace.errors import InputError
from autoplace.graph.caches import capture_kwargs
from autoplace.graph.capture import capture
from autoplace.graph.dispatch_capture import capture_by_dispatch
from autoplace.workload import Workload


def held_bytes(model):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def is_forward(graph):
    edges = graph.edge_list
    return bool((edges[:, 0] < edges[:, 1]).all())


def test_mlp_is_captured_exactly():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2, bias=False))
    captured = capture(Workload(model=model, args=(torch.ones(3, 8),)))
    graph = captured.graph
    assert (captured.rung, captured.reason, captured.dynamic_batch) == ("export", "", True)
    assert graph.kinds == ("linear", "relu", "linear")
    assert graph.modules == ("0", "1", "2")
    assert graph.flops.tolist() == [2 * 3 * 8 * 16, 3 * 16, 2 * 3 * 16 * 2]
    assert graph.weight_bytes.tolist() == [4 * (8 * 16 + 16), 0, 4 * 32]
    assert graph.activation_bytes.tolist() == [4 * 48, 4 * 48, 4 * 6]
    assert graph.bytes_moved.tolist() == [4 * (24 + 128 + 16 + 48), 4 * 96, 4 * (48 + 32 + 6)]
    assert graph.edge_list[:, :2].tolist() == [[0, 1], [1, 2]]
    assert graph.tensor_bytes.tolist() == [192, 192]
    assert graph.frees.all()


def test_training_graph_holds_activations_and_dropout():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    inputs = (torch.ones(2, 4),)
    trained = capture(Workload(model=model, args=inputs, training=True)).graph
    evaluated = capture(Workload(model=model, args=inputs)).graph
    assert trained.kinds == ("linear", "dropout") and evaluated.kinds == ("linear",)
    assert not trained.frees.any()


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_transformers_are_exported_with_a_dynamic_batch(transformers_models, name, training):
    model, kwargs = transformers_models[name]()
    captured = capture(Workload(model=model, kwargs=kwargs, training=training))
    assert captured.rung == "export" and captured.dynamic_batch
    assert captured.graph.weight_bytes.sum() == held_bytes(model)
    assert is_forward(captured.graph)
    assert all(model.get_submodule(path) is not None for path in captured.graph.modules)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dispatch_sees_what_export_sees(transformers_models, name):
    model, kwargs = transformers_models[name]()
    workload = Workload(model=model.eval(), kwargs=kwargs)
    exported = capture(workload).graph
    recorded, called = capture_by_dispatch(workload, capture_kwargs(workload))
    assert recorded.flops.sum() == pytest.approx(exported.flops.sum(), rel=0.01)
    assert recorded.bytes_moved.sum() == pytest.approx(exported.bytes_moved.sum(), rel=0.05)
    assert recorded.tensor_bytes.sum() == pytest.approx(exported.tensor_bytes.sum(), rel=0.05)
    assert recorded.weight_bytes.sum() == held_bytes(model)
    assert called >= set(exported.modules)


def test_control_flow_falls_to_dispatch(models):
    model = models["branching"]()
    captured = capture(Workload(model=model, args=(torch.ones(2, 4),)))
    assert captured.rung == "dispatch"
    assert captured.reason.startswith("torch.export: ") and "\n" not in captured.reason
    assert "left" in captured.graph.modules and "right" not in captured.graph.modules
    assert captured.graph.weight_bytes.sum() == held_bytes(model)


def test_a_run_of_few_samples_stands_for_the_batch(models, monkeypatch):
    sizes = []

    def noted(workload, kwargs):
        sizes.append(workload.batch_size)
        return capture_by_dispatch(workload, kwargs)

    monkeypatch.setattr("autoplace.graph.capture.capture_by_dispatch", noted)
    few, whole = (Workload(model=models["branching"](), args=(torch.ones(size, 4),)) for size in (2, 8))
    carried, measured = capture(whole, tried=few).graph, capture(whole).graph
    assert sizes == [2, 8]
    assert carried.activation_bytes[-1] == measured.activation_bytes[-1] == 8 * 4 * 4
    assert carried.flops[-1] == measured.flops[-1] and carried.weight_bytes.sum() == measured.weight_bytes.sum()


def test_module_is_the_last_rung(models, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no recording today\nand a long story")

    monkeypatch.setattr("autoplace.graph.capture.capture_by_dispatch", refuse)
    model = models["branching"]()
    captured = capture(Workload(model=model, args=(torch.ones(2, 4),)))
    assert captured.rung == "module"
    assert captured.reason.endswith("recording a run: RuntimeError: no recording today")
    assert captured.graph.names == (".",)
    assert captured.graph.weight_bytes.tolist() == [held_bytes(model)]


def test_wrong_inputs_are_the_users_error():
    with pytest.raises(InputError, match=r"cannot run on these inputs \(.*mat1"):
        capture(Workload(model=nn.Linear(4, 4), args=(torch.ones(2, 5),)))


def test_model_without_operations_is_one_op():
    captured = capture(Workload(model=nn.Identity(), args=(torch.ones(2),)))
    assert captured.rung == "module" and captured.graph.num_ops == 1


@pytest.mark.parametrize("by", ["export", "dispatch"])
def test_shared_module_keeps_one_name_and_one_home(models, by):
    model = models["shared"]().eval()
    workload = Workload(model=model, args=(torch.ones(2, 4),))
    graph = capture(workload).graph if by == "export" else capture_by_dispatch(workload, {})[0]
    assert graph.modules == ("first", "", "first", "last")
    assert graph.colocate.tolist() == [0, -1, 0, -1]
    assert graph.weight_bytes.tolist() == [80, 0, 0, 40]


def test_tied_weights_count_once_and_share_a_device(transformers_models):
    model, kwargs = transformers_models["gpt2"]()
    graph = capture(Workload(model=model, kwargs=kwargs)).graph
    tied = [graph.modules[op] for op in range(graph.num_ops) if graph.colocate[op] >= 0]
    assert tied == ["transformer.wte", "lm_head"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rung", ["export", "dispatch"])
def test_capture_leaves_no_trace(models, monkeypatch, training, rung):
    if rung == "dispatch":
        monkeypatch.setattr("autoplace.graph.capture.capture_by_export", lambda *_: 1 / 0)
    model = models["conv"]()
    model.head.eval()
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    buffers, random = dict(model.named_buffers()), torch.get_rng_state()
    captured = capture(Workload(model=model, args=(torch.ones(2, 3, 4, 4),), training=training))
    assert captured.rung == rung
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, c) for p, (g, c) in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == flags
    assert all(tensor is buffers[name] for name, tensor in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.nn.modules.module._global_forward_hooks


def test_called_modules_leave_out_containers():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    workload = Workload(model=Listed(), args=(torch.ones(2, 4),))
    assert capture(workload).called == {"", "layers.0", "layers.1"}
    assert capture_by_dispatch(workload, {})[1] == {"", "layers.0", "layers.1"}


def test_an_export_that_fails_leaves_no_marks_on_the_inputs(models):
    x = torch.ones(2, 4)
    assert capture(Workload(model=models["branching"](), args=(x,))).rung == "dispatch"
    assert not [name for name in vars(x) if "dynamo" in name]


def test_a_batch_that_cannot_stay_free_is_fixed():
    class Fixed(nn.Module):
        def forward(self, x):
            if x.shape[0] not in (3, 5) and not isinstance(x.shape[0], int):
                raise ValueError("a number, please")
            return x * 2

    captured = capture(Workload(model=Fixed(), args=(torch.ones(4, 2),)))
    assert (captured.rung, captured.dynamic_batch) == ("export", False)


@pytest.mark.parametrize("validate", [True, False])
def test_arguments_of_distributions_are_not_looked_at(validate):
    class Likelihood(nn.Linear):
        def forward(self, x, y):
            return -torch.distributions.Normal(super().forward(x), 1.0).log_prob(y).mean()

    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(validate)
    try:
        captured = capture(Workload(model=Likelihood(2, 2), args=(torch.ones(3, 2), torch.ones(3, 2))))
        assert captured.rung == "export"
        assert torch.distributions.Distribution._validate_args is validate
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_blocks_without_gradients_are_looked_into():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)
            return self.head(x)

    captured = capture(Workload(model=Frozen(), args=(torch.ones(3, 4),), training=True))
    assert captured.rung == "export"
    assert captured.graph.modules == ("frozen", "head")
    assert captured.graph.edge_list[:, :2].tolist() == [[0, 1]]
