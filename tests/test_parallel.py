"""`OptimizedParallel` feels like the model: its keys, its parameters, its results, under every shape of plan."""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch

from autoplace import OptimizedParallel, Plan
from autoplace.errors import InputError, PlanFileError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Replica

A, B = "host0/cpu:0", "host0/cpu:1"
PLANS = {
    "single": ([({".": A}, 1.0)], 1),
    "replicas": ([({".": A}, 0.75), ({".": B}, 0.25)], 1),
    "stages": ([({"0": A, "1": A, "2": B}, 1.0)], 2),
}


@pytest.fixture
def cluster():
    cores = sorted(os.sched_getaffinity(0))
    devices = tuple(Device(name=n, kind="cpu", cores=(c,)) for n, c in zip((A, B), (cores[0], cores[-1]), strict=True))
    return Cluster(devices=devices, default_link=Link(latency_ms=0.03, bytes_per_ms=1e7))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def _plan(shape):
    replicas, microbatches = PLANS[shape]
    return Plan(
        replicas=tuple(Replica(assignment=a, share=s) for a, s in replicas), strategy="test", microbatches=microbatches
    )


@pytest.fixture(params=PLANS)
def wrapped(request, model, cluster):
    wrapper = OptimizedParallel(model, plan=_plan(request.param), cluster=cluster)
    yield wrapper
    wrapper.close()


def test_outputs_and_gradients_are_the_models(wrapped, model):
    inputs = torch.randn(8, 8)
    plain = copy.deepcopy(model)
    expected, got = plain(inputs), wrapped(inputs)
    assert wrapped.plan is not None and not wrapped.plan.is_plain
    torch.testing.assert_close(got, expected)
    expected.square().mean().backward()
    got.square().mean().backward()
    for mine, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_keys_and_parameters_are_the_models(wrapped, model):
    assert list(wrapped.state_dict()) == list(model.state_dict())
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in model.parameters()]
    assert [n for n, _ in wrapped.named_modules()] == [n for n, _ in model.named_modules()]
    other = copy.deepcopy(model)
    wrapped.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_an_optimizer_made_before_wrapping_works(model, cluster):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    wrapper = OptimizedParallel(model, plan=_plan("stages"), cluster=cluster)
    wrapper(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    wrapper.close()


def test_train_and_eval_reach_every_module(wrapped, model):
    wrapped.eval()
    assert not any(m.training for m in model.modules())
    wrapped.train()
    assert all(m.training for m in model.modules()) and wrapped.training


class Flat(torch.nn.Module):
    """Has no batch dimension in its output from batches of four on."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x).flatten() if len(x) > 4 else self.inner(x)


def test_a_batch_that_the_plan_cannot_run_goes_to_plain_pytorch(cluster):
    model = Flat()
    wrapper = OptimizedParallel(model, plan=_plan("replicas"), cluster=cluster)
    wrapper(torch.randn(4, 8))
    many = torch.randn(16, 8)
    with pytest.warns(UserWarning, match="this batch by plain PyTorch"):
        torch.testing.assert_close(wrapper(many), model(many))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(wrapper(many), model(many))
    assert not wrapper.plan.is_plain, "batches of four go on by the plan"
    wrapper.close()


def test_a_plan_that_computes_something_else_is_not_run(cluster):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).train()
    plan = Plan(replicas=(Replica(assignment={".": A}),), strategy="test", microbatches=2)
    wrapper = OptimizedParallel(model, plan=plan, cluster=cluster)
    with pytest.warns(UserWarning, match="statistics over the whole batch"):
        wrapper(torch.randn(8, 8))
    assert wrapper.plan.is_plain


def test_attributes_fall_through_and_missing_ones_are_named(wrapped, model):
    model.note = "kept"
    assert wrapped.note == "kept"
    assert wrapped.get_submodule("0") is model[0] and callable(wrapped.append)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrapped.nothing_of_the_kind


def test_tuning_on_the_first_call_leaves_inputs_and_gradients_alone(model, cluster, tmp_path):
    wrapper = OptimizedParallel(model.train(), cluster=cluster, policy=None, budget_s=2.0, track=False, cache=False)
    inputs = torch.randn(8, 8, requires_grad=True)
    with pytest.raises(InputError, match="call the model once"):
        wrapper.visualize_performance(tmp_path)
    output = wrapper(inputs)
    assert inputs.grad is None and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(output, model(inputs))
    assert wrapper.visualize_performance(tmp_path).stat().st_size > 1000
    wrapper.close()


def test_a_tuning_is_an_mlflow_run(model, cluster):
    from autoplace.zoo import resolve_tracking_uri
    from autoplace.zoo._client import open_client

    wrapper = OptimizedParallel(model.eval(), cluster=cluster, policy=None, budget_s=2.0, cache=False)
    with torch.no_grad():
        wrapper(torch.randn(8, 8))
    client = open_client(resolve_tracking_uri())
    experiment = client.get_experiment_by_name("autoplace-tune")
    run = client.search_runs([experiment.experiment_id])[0]
    assert run.data.params["model"] == "Sequential" and run.info.status == "FINISHED"
    assert run.data.metrics["plain/latency_ms"] > 0
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"plan.json", "result.json"}
    wrapper.close()


def test_a_copy_tunes_for_itself(wrapped):
    inputs = torch.randn(8, 8)
    expected = wrapped(inputs)
    twin = copy.deepcopy(wrapped)
    torch.testing.assert_close(twin(inputs), expected)
    assert not set(map(id, twin.parameters())) & set(map(id, wrapped.parameters()))
    assert twin._parameters is twin._state.model._parameters
    twin.close()


def test_bad_arguments(model, tmp_path):
    with pytest.raises(InputError, match="function"):
        OptimizedParallel(lambda x: x)
    with pytest.raises(InputError, match="energy_weight"):
        OptimizedParallel(model, energy_weight=2.0)
    with pytest.raises(PlanFileError, match="does not exist"):
        OptimizedParallel(model, plan=tmp_path / "nowhere.json")


def test_a_plan_for_other_devices_is_refused(model, cluster):
    plan = _plan("single").with_(cluster_fingerprint="0123456789abcdef")
    with warnings.catch_warnings(), pytest.raises(PlanFileError, match="other devices"):
        OptimizedParallel(model, plan=plan, cluster=cluster)(torch.randn(2, 8))


def test_it_does_not_tune_where_its_passes_would_set_off_the_users_hooks(model, cluster):
    steps = []
    model[0].weight.register_post_accumulate_grad_hook(steps.append)
    wrapper = OptimizedParallel(model.train(), cluster=cluster, policy=None, budget_s=2.0, track=False, cache=False)
    with pytest.warns(UserWarning, match="plain PyTorch for now"):
        wrapper(torch.randn(8, 8)).sum().backward()
    assert len(steps) == 1 and wrapper.plan is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper(torch.randn(8, 8))


def test_tuning_leaves_batch_norm_statistics_alone(cluster):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).train()
    wrapper = OptimizedParallel(model, cluster=cluster, policy=None, budget_s=2.0, track=False, cache=False)
    wrapper(torch.randn(8, 8))
    assert model[1].num_batches_tracked == 1, "the user's call alone counts"
    wrapper.close()
