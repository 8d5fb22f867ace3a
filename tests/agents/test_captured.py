import dataclasses

import numpy as np
import pytest

from autoplace.agents import captured
from autoplace.agents.captured import MODELS, captured_graph, grouped
from autoplace.agents.captured_problems import draw_captured_problem
from autoplace.agents.conditions import Conditions
from autoplace.envs.reference import constructive_baselines
from autoplace.errors import InputError

pytest.importorskip("transformers")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A model of two layers under the name `bert`, and an empty cache."""
    settings = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    monkeypatch.setitem(MODELS, "bert", dataclasses.replace(MODELS["bert"], settings=settings))
    monkeypatch.setenv("AUTOPLACE_CACHE_DIR", str(tmp_path))
    captured_graph.cache_clear()
    yield "bert"
    captured_graph.cache_clear()


def test_a_graph_is_captured_once_and_read_back_the_same(small, monkeypatch):
    first = captured_graph(small, training=False)
    assert 20 < first.graph.num_ops < 80 and first.graph.flops.sum() > 0 and first.graph.frees.all()
    captured_graph.cache_clear()
    monkeypatch.setattr(captured, "_capture", lambda *args: pytest.fail("the cache was not used"))
    again = captured_graph(small, training=False)
    assert again.graph.fingerprint == first.graph.fingerprint and again.called == first.called


def test_groups_follow_modules(small):
    whole = captured_graph(small, training=False)
    coarse = grouped(whole, 6)
    assert 2 <= coarse.num_ops <= 6 < grouped(whole, 40).num_ops
    assert coarse.flops.sum() == pytest.approx(whole.graph.flops.sum())


@pytest.mark.parametrize("training", [False, True])
def test_problems_of_a_model_are_feasible_and_scaled(small, training):
    graph = captured_graph(small, training=training).graph
    for seed in range(6):
        problem = draw_captured_problem(
            np.random.default_rng(seed), small, ("unequal", "hosts")[seed % 2], name="x", training=training,
            max_ops=None, conditions=Conditions(devices=3, goal="throughput", memory="ample"),
        )  # fmt: skip
        assert problem.num_ops == (2 * graph.num_ops + 1 if training else graph.num_ops)
        assert problem.num_devices == 3 and problem.objective.goal == "throughput"
        ratio = problem.graph.flops.sum() / graph.flops.sum() / (3.0 if training else 1.0)
        assert 0.24 < ratio < 4.1 and constructive_baselines(problem)
        again = draw_captured_problem(
            np.random.default_rng(seed), small, ("unequal", "hosts")[seed % 2], name="x", training=training,
            max_ops=None, conditions=Conditions(devices=3, goal="throughput", memory="ample"),
        )  # fmt: skip
        assert again.fingerprint == problem.fingerprint


def test_sizes_keep_to_the_limit(small):
    for seed in range(10):
        problem = draw_captured_problem(
            np.random.default_rng(seed), small, "equal", name="x", training=bool(seed % 2), max_ops=25, in_order=True
        )
        assert problem.num_ops <= 25


def test_unknown_models_and_missing_transformers_are_refused(monkeypatch):
    with pytest.raises(InputError, match="mixtral"):
        captured_graph("nothing", training=False)
    monkeypatch.setattr(captured, "available", lambda: False)
    with pytest.raises(InputError, match=r"autoplace\[transformers\]"):
        captured_graph("vit", training=False)
