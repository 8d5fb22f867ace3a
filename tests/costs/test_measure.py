import numpy as np
import pytest
import torch
from torch import nn

from autoplace.costs.measure import measure_total_ms, on_device, profile_groups, smaller_batch
from autoplace.graph.capture import capture
from autoplace.graph.coarsen import coarsen
from autoplace.workload import Workload


def test_groups_get_their_own_time_and_the_glue_after_them(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 4}, {"fixed_ms": 8}, glue_ms=10)
    times = profile_groups(workload, grouping, one_cpu.devices[0], repeats=3)
    assert grouping.graph.names == ("a", "b")
    assert times.backward_ms is None and times.backward_overhead_ms is None
    assert times.forward_ms.sum() == pytest.approx(times.total_ms)
    assert times.total_ms >= 22
    assert 1.2 < times.forward_ms[0] / times.forward_ms[1] < 2.5  # 14 to 8


def test_overhead_is_what_a_smaller_batch_does_not_save(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 12}, {"sample_ms": 3})
    times = profile_groups(workload, grouping, one_cpu.devices[0], repeats=3)
    assert times.forward_overhead_ms[0] > 0.6 * times.forward_ms[0]
    assert times.forward_overhead_ms[1] < 0.4 * times.forward_ms[1]
    assert (times.forward_overhead_ms <= times.forward_ms).all()


def test_a_part_of_the_batch_stands_for_the_whole_of_it(sleepers, one_cpu):
    """Twelve milliseconds and three a sample: of four samples, 12 and 12."""
    workload, grouping = sleepers({"fixed_ms": 12}, {"sample_ms": 3})
    sizes = []
    handle = workload.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    times = profile_groups(workload, grouping, one_cpu.devices[0], repeats=3, samples=2)
    handle.remove()
    assert set(sizes) == {1, 2}
    assert times.total_ms == pytest.approx(24, rel=0.4)
    assert times.forward_ms[0] / times.forward_ms[1] == pytest.approx(1.0, rel=0.5)
    assert times.forward_overhead_ms[0] > 0.6 * times.forward_ms[0]
    assert times.forward_overhead_ms[1] < 0.4 * times.forward_ms[1]
    assert any("times of 4 samples follow from passes of 2" in note for note in times.notes)


def test_backward_is_measured_per_group(sleepers, one_cpu):
    workload, grouping = sleepers({"fixed_ms": 2, "backward_ms": 12}, {"backward_ms": 4}, training=True)
    times = profile_groups(workload, grouping, one_cpu.devices[0], repeats=3)
    assert 1.7 < times.backward_ms[0] / times.backward_ms[1] < 5  # 12 to 4
    assert times.backward_ms.sum() >= 16
    assert times.total_ms == pytest.approx(times.forward_ms.sum() + times.backward_ms.sum())
    assert not times.notes


class Odd(nn.Module):
    """BatchNorm, dropout, an operation in place and an integer input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, ids):
        return {"logits": self.head(self.drop(self.block(self.embed(ids)))), "none": None}


@pytest.mark.parametrize(("training", "batch"), [(False, 1), (False, 5), (True, 5)])
def test_measuring_leaves_no_trace(one_cpu, training, batch):
    model = Odd()
    model.block.eval()
    model(torch.arange(3))["logits"].sum().backward()
    workload = Workload(model=model, args=(torch.arange(batch),), training=training)
    captured = capture(workload)
    grouping = coarsen(captured.graph, min_cost_fraction=0.0, called=captured.called)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    flags, random = [m.training for m in model.modules()], torch.get_rng_state()
    times = profile_groups(workload, grouping, one_cpu.devices[0], repeats=1)
    assert np.isfinite(times.forward_ms).all() and (times.forward_ms >= 0).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is g and torch.equal(g, c) for p, (g, c) in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_a_batch_that_does_not_run_is_noted(one_cpu):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    workload = Workload(model=model, args=(torch.ones(2, 4),), training=True)
    grouping = coarsen(capture(workload).graph)
    times = profile_groups(workload, grouping, one_cpu.devices[0], repeats=1)
    assert times.notes == ("half the batch does not run (ValueError); overheads are taken as 0",)
    assert times.forward_overhead_ms.sum() == times.backward_overhead_ms.sum() == 0


def test_errors_of_the_model_come_through(one_cpu, sleepers):
    workload, grouping = sleepers({}, {})
    broken = Workload(model=workload.model, args=("no tensor",))
    with pytest.raises(TypeError):
        profile_groups(broken, grouping, one_cpu.devices[0], repeats=1)


def test_total_of_a_whole_pass(sleepers, one_cpu):
    workload, _ = sleepers({"fixed_ms": 3, "backward_ms": 5}, {}, training=True)
    assert measure_total_ms(workload, one_cpu.devices[0], repeats=1) >= 8


def test_smaller_batch_cuts_every_batched_tensor():
    workload = Workload(
        model=nn.Identity(), args=(torch.zeros(4, 2), torch.zeros(3)), kwargs={"mask": torch.zeros(4), "flag": True}
    )
    half = smaller_batch(workload, 2)
    assert half.args[0].shape == (2, 2) and half.args[1].shape == (3,)
    assert half.kwargs["mask"].shape == (2,) and half.kwargs["flag"] is True
    assert half.batch_size == 2 and half.model is workload.model


def test_a_model_that_is_there_already_is_not_copied():
    workload = Workload(model=nn.Linear(2, 2), args=(torch.ones(1, 2),))
    assert on_device(workload, torch.device("cpu")).model is workload.model
    moved = on_device(workload, torch.device("meta"))
    assert moved.model is not workload.model and moved.model.weight.is_meta and moved.args[0].is_meta
    assert not workload.model.weight.is_meta
