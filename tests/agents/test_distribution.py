import numpy as np
import pytest

from autoplace.agents.captured import MODELS
from autoplace.agents.distribution import (
    HELD_OUT_CLUSTERS,
    HELD_OUT_FAMILIES,
    HELD_OUT_MODELS,
    TRAIN_CLUSTERS,
    TRAIN_FAMILIES,
    TRAIN_MODELS,
    draw_problem,
    held_out_problems,
    training_problems,
)
from autoplace.agents.families import FAMILIES
from autoplace.envs.reference import constructive_baselines
from autoplace.errors import InputError


def test_same_seed_same_problems_whatever_the_count():
    few, many = training_problems(3, seed=4), training_problems(9, seed=4)
    assert [p.fingerprint for p in few] == [p.fingerprint for p in many[:3]]
    assert few[0].fingerprint != training_problems(1, seed=5)[0].fingerprint


def test_the_split_keeps_families_and_clusters_apart():
    assert not set(TRAIN_FAMILIES) & set(HELD_OUT_FAMILIES) and not set(TRAIN_CLUSTERS) & set(HELD_OUT_CLUSTERS)
    assert set(TRAIN_FAMILIES) | set(HELD_OUT_FAMILIES) == set(FAMILIES)
    for problem in training_problems(40, seed=0):
        family, cluster = problem.name.split("-")[-2:]
        assert family in TRAIN_FAMILIES and cluster in TRAIN_CLUSTERS
    held = [p.name.split("-")[-2:] for p in held_out_problems(24, seed=0)]
    assert {f for f, _ in held} == set(HELD_OUT_FAMILIES) and "hosts" in {c for _, c in held}


def test_the_split_keeps_models_apart(monkeypatch):
    assert not set(TRAIN_MODELS) & set(HELD_OUT_MODELS) and set(TRAIN_MODELS) | set(HELD_OUT_MODELS) == set(MODELS)
    assert len(TRAIN_MODELS) >= 10 and len(HELD_OUT_MODELS) >= 6
    drawn = []

    def record(random, model, cluster, *, name, **rest):
        drawn.append((name.split("-")[0], model, cluster))
        return draw_problem(random, "chain", "equal", name=name, size=4)

    monkeypatch.setattr("autoplace.agents.distribution.draw_captured_problem", record)
    training_problems(200, seed=0, captured=0.5)
    held_out_problems(200, seed=0, captured=0.5)
    train, held = ([row for row in drawn if row[0] == side] for side in ("train", "held"))
    assert {model for _, model, _ in train} == set(TRAIN_MODELS) and {c for _, _, c in train} == set(TRAIN_CLUSTERS)
    assert {model for _, model, _ in held} == set(HELD_OUT_MODELS) and 70 < len(held) < 130


def test_the_distribution_is_wide():
    problems = training_problems(120, seed=1)
    assert {p.objective.goal for p in problems} == {"latency", "throughput"}
    assert {p.num_devices for p in problems} == set(range(2, 17))
    assert {p.semantics.route for p in problems} == {"direct", "host"}
    assert {p.semantics.transfers for p in problems} == {"overlapped", "blocking"}
    assert {p.semantics.contention for p in problems} == {"link", "none"}
    assert 0.3 < np.mean([p.objective.goal == "throughput" for p in problems]) < 0.5
    sizes = [p.num_ops for p in problems]
    assert max(sizes) > 200 and np.median(sizes) < 100
    limited = [np.isfinite(p.cluster.devices[0].memory_bytes) for p in problems]
    assert 0.3 < np.mean(limited) < 0.7
    assert 0.1 < np.mean([p.objective.energy_weight > 0 for p in problems]) < 0.6


def test_nearly_every_problem_has_a_feasible_baseline():
    problems = training_problems(40, seed=2, max_ops=40) + held_out_problems(12, seed=2, max_ops=40)
    assert np.mean([bool(constructive_baselines(p)) for p in problems]) >= 0.95


def test_unknown_families_are_refused():
    with pytest.raises(InputError, match="chain"):
        draw_problem(np.random.default_rng(0), "nothing", "equal", name="x")
