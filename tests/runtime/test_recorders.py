"""`transformers` collects hidden states by hooks and a context variable; under plans they come as well."""

import contextvars

import pytest
import torch
from transformers import BertConfig, BertModel

from autoplace.replan import silenced_hooks
from autoplace.runtime import TaskThread, build_executor
from autoplace.runtime.fitness import records_outputs, unfit

A, B = "host0/cpu:0", "host0/cpu:1"


@pytest.fixture
def bert():
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config).eval()


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_tasks_see_the_callers_context_variables():
    said = contextvars.ContextVar("said", default="nothing")
    thread = TaskThread("helper", threads=1)
    try:
        said.set("hello")
        assert thread.run(said.get) == "hello"
        thread.run(lambda: said.set("changed"))
        assert said.get() == "hello" and thread.run(said.get) == "hello"
    finally:
        thread.close()


@pytest.mark.parametrize(
    "plan", [(A,), (A, B), ({"embeddings": A, "encoder.layer.0": A, "encoder.layer.1": B, "pooler": B},)]
)
def test_hidden_states_and_attentions_come_from_other_threads(bert, cluster, make_plan, plan):
    wanted = {"input_ids": torch.arange(20).reshape(4, 5), "output_hidden_states": True, "output_attentions": True}
    expected = bert(**wanted)
    with build_executor(bert, make_plan(*plan, microbatches=2), cluster) as executor:
        for _ in range(3):
            output = executor(**wanted)
            assert len(output.hidden_states) == 3 and len(output.attentions) == 2
            torch.testing.assert_close(output.to_tuple(), expected.to_tuple())


def test_their_hooks_are_part_of_the_model(bert, make_plan):
    bert(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    assert hooks_of(bert) and all(map(records_outputs, hooks_of(bert)))
    assert unfit(bert, make_plan(A, B), training=False) == ""
    with silenced_hooks(bert) as silenced:
        assert not silenced and hooks_of(bert)


def test_the_users_hooks_are_not(bert, make_plan):
    bert(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    bert.pooler.register_forward_hook(lambda module, args, output: None)
    assert "hooks" in unfit(bert, make_plan(A, B), training=False)
    before = len(hooks_of(bert))
    with silenced_hooks(bert) as silenced:
        assert silenced and len(hooks_of(bert)) == before - 1
    assert len(hooks_of(bert)) == before


def test_an_exported_graph_holds_what_they_record(bert, cluster, make_plan):
    wanted = {"input_ids": torch.arange(20).reshape(4, 5), "output_hidden_states": True}
    expected = bert(**wanted)
    halves = {"embeddings": A, "encoder.layer.0": A, "encoder.layer.1": B, "pooler": B}
    with build_executor(bert, make_plan(halves, microbatches=2, engine="graph"), cluster) as executor:
        output = executor(**wanted)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.to_tuple(), expected.to_tuple())


def test_a_parameter_that_goes_from_stage_to_stage_without_gradients(cluster, make_plan):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Identity()
            self.third = torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.third(self.first(x)) @ self.second(self.first.weight)

    model, x = Tied(), torch.randn(64, 64)
    plan = make_plan({"first": A, "second": A, "third": B}, engine="graph")
    with build_executor(model, plan, cluster) as executor:
        with torch.no_grad():
            torch.testing.assert_close(executor(x), model(x))
        torch.testing.assert_close(executor(x), model(x))
