"""Why a plan would not keep a model's habits, and how a change of them is noticed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoplace.plan import Plan
from autoplace.runtime import fitness
from autoplace.runtime.fitness import Habits, unfit

A, B = "host0/cpu:0", "host0/cpu:1"


@pytest.fixture
def plans(make_plan):
    return SimpleNamespace(
        single=make_plan(A),
        replicas=make_plan(A, B),
        stages=make_plan({"0": A, "1": B}),
        pipeline=make_plan({"0": A, "1": B}, microbatches=2),
        graph=make_plan({"0": A, "1": B}, engine="graph"),
        processes=make_plan(A, B, engine="processes"),
        compiled=make_plan(A, compiled=True),
    )


def _model(*more):
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), *more)


def test_an_ordinary_model_fits_every_plan(plans):
    for plan in (Plan.plain(), *vars(plans).values()):
        assert unfit(_model(), plan, training=True) == "" == unfit(_model(), plan, training=False)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_forbid_parts_and_engines_that_do_not_call_modules(plans, kind):
    model = _model()
    handle = getattr(model[1], f"register_{kind}_hook")(lambda *_: None)
    assert unfit(model, plans.single, training=True) == "" == unfit(model, plans.stages, training=True)
    for plan in (plans.replicas, plans.pipeline, plans.processes):
        assert "fire 2 times a call" in unfit(model, plan, training=False)
    assert "engine 'graph' does not call" in unfit(model, plans.graph, training=False)
    assert "compiled code does not always call" in unfit(model, plans.compiled, training=False)
    handle.remove()
    assert unfit(model, plans.replicas, training=True) == ""


def test_batch_statistics_forbid_parts_where_they_are_computed(plans):
    model = _model(torch.nn.BatchNorm1d(4))
    for plan in (plans.replicas, plans.pipeline):
        assert "BatchNorm1d computes statistics over the whole batch" in unfit(model.train(), plan, training=True)
        assert unfit(model.eval(), plan, training=False) == ""
    assert unfit(model.train(), plans.stages, training=True) == ""
    model[2].eval()
    assert unfit(model, plans.replicas, training=True) == "", "frozen by the user"
    blind = _model(torch.nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert "BatchNorm1d" in unfit(blind, plans.replicas, training=False), "it never has statistics of its own"


def test_instance_norm_forbids_parts_only_where_it_keeps_statistics(plans):
    assert unfit(_model(torch.nn.InstanceNorm1d(4)).train(), plans.replicas, training=True) == ""
    tracking = _model(torch.nn.InstanceNorm1d(4, track_running_stats=True))
    assert "running statistics once a call" in unfit(tracking.train(), plans.replicas, training=True)


def test_the_tuner_may_ask_before_it_sets_the_flags(plans):
    model = _model(torch.nn.BatchNorm1d(4)).eval()
    assert "BatchNorm1d" in unfit(model, plans.replicas, training=True)


def test_checkpointing_forbids_the_graph_and_reentrant_backwards(plans):
    model = _model()
    model[0].gradient_checkpointing = True
    assert "does not keep" in unfit(model, plans.graph, training=True)
    assert unfit(model, plans.graph, training=False) == "" == unfit(model, plans.replicas, training=True)
    model[0]._gradient_checkpointing_func = SimpleNamespace(keywords={"use_reentrant": True})
    assert "use_reentrant=True" in unfit(model, plans.replicas, training=True)


def test_habits_look_only_when_something_moved(plans, monkeypatch):
    model, looks = _model(torch.nn.BatchNorm1d(4)).eval(), []
    habits = Habits(model, plans.replicas, training=False)
    original = fitness.unfit
    monkeypatch.setattr(fitness, "unfit", lambda *a, **k: looks.append(1) or original(*a, **k))
    assert [habits.reason() for _ in range(3)] == [""] * 3 and not looks
    handle = model[0].register_forward_hook(lambda *_: None)
    assert "hooks" in habits.reason() and len(looks) == 1
    handle.remove()
    assert habits.reason() == "" and len(looks) == 2
    torch.nn.Linear(2, 2).register_forward_hook(lambda *_: None)
    assert habits.reason() == "" == habits.reason() and len(looks) == 3, "a hook elsewhere costs one look"
    model[2].train()
    assert "BatchNorm1d" in habits.reason()
    model[2].eval()
    assert habits.reason() == ""


def test_habits_notice_replaced_modules(plans):
    model = _model()
    habits = Habits(model, plans.single, training=True)
    torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert habits.reason() == "", "another model was built"
    model[0] = torch.nn.Linear(4, 4)
    assert "were replaced" in habits.reason() and "were replaced" in habits.reason()


def test_habits_notice_checkpointing(plans):
    model = _model()
    model[0].gradient_checkpointing = False
    habits = Habits(model, plans.graph, training=True)
    assert habits.reason() == ""
    model[0].gradient_checkpointing = True
    assert "checkpoints" in habits.reason()


def test_hooks_for_all_modules_count(plans):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert fitness.has_global_hooks() and "hooks" in unfit(_model(), plans.replicas, training=False)
    finally:
        handle.remove()
    assert not fitness.has_global_hooks()


def test_habits_notice_attributes_that_a_graph_holds_as_constants(plans):
    model = _model(torch.nn.Dropout(0.5))
    model.scale, model.config = 1.0, SimpleNamespace(depth=2)
    graph, threads = (Habits(model, plan, training=True) for plan in (plans.graph, plans.stages))
    assert graph.reason() == ""
    for holder, name, value in ((model, "scale", 2.0), (model[2], "p", 0.1), (model.config, "depth", 3)):
        before = getattr(holder, name)
        setattr(holder, name, value)
        assert "attributes of the model changed" in graph.reason() and threads.reason() == ""
        setattr(holder, name, before)
        assert graph.reason() == ""
    del model.scale
    assert "attributes of the model changed" in graph.reason()


class Slices(torch.nn.Module):
    """Makes a new ModuleList in every forward, as decoders do that loop over `self.layers[:n]`."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return x


def test_module_lists_made_in_forward_are_no_news(plans, monkeypatch):
    model, x = Slices(), torch.ones(1, 2)
    habits = Habits(model, plans.single, training=False)
    monkeypatch.setattr(habits, "_look", lambda: pytest.fail("nothing of the model has changed"))
    model(x)
    assert habits.reason() == ""
    compiled = []
    call = torch.compile(model, backend=lambda graph, _inputs: compiled.append(graph) or graph.forward)
    for _ in range(4):
        call(x)
        model.layers[1:]
    assert len(compiled) == 1, "a count of what registers is no constant of compiled code"
