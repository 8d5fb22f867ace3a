import numpy as np
import pytest

from autoplace.agents.train import TrainConfig, train
from autoplace.errors import InputError
from autoplace.policy.policy import Policy


def same(one, other):
    return all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole tiny run, to compare others with."""
    from autoplace.agents.ppo import PpoConfig

    config = TrainConfig(
        output=tmp_path_factory.mktemp("whole") / "run",
        problems=4,
        captured=0.0,
        workers=1,
        max_ops=12,
        max_devices=3,
        teacher_evaluations=40,
        imitate_epochs=2,
        simulate_steps=120,
        validation=3,
        held_out=3,
        hidden=8,
        command="autoplace train -o run",
        ppo=PpoConfig(envs=2, steps=30, updates_per_chunk=1, batch_size=30, epochs=2, warmup_updates=0),
    )
    seen = []
    return train(config, log=lambda metrics, step: seen.append((step, metrics))), seen


def test_a_run_writes_a_loadable_policy_with_card_and_evaluation(finished):
    directory, seen = finished
    policy = Policy.load(directory)
    assert "autoplace train -o run" in policy.card and "seed 0" in policy.card and "diamond" in policy.card
    assert policy.evaluation["held_out_greedy"]["problems"] == 3
    assert {"heft", "metf", "best_heuristic"} <= set(policy.evaluation["held_out_greedy"]["ratio"])
    names = {name for _, metrics in seen for name in metrics}
    assert {"imitate/loss", "ppo/reward", "validation/reward", "held_out/heft"} <= names
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)


def test_same_seed_same_weights_and_another_seed_others(finished, tiny):
    again = Policy.load(train(tiny("again")))
    assert same(Policy.load(finished[0]), again)
    assert not same(again, Policy.load(train(tiny("other", seed=1))))


@pytest.mark.parametrize("stop", ["imitate/loss", "simulate/learning_rate"])
def test_resuming_equals_not_being_interrupted(finished, tiny, stop):
    def interrupt(metrics, step):
        if stop in metrics:
            interrupt.count += 1
            if interrupt.count == 2:
                raise Interrupted

    interrupt.count = 0
    with pytest.raises(Interrupted):
        train(tiny(), log=interrupt)
    resumed = Policy.load(train(tiny(resume=True)))
    assert same(Policy.load(finished[0]), resumed)


def test_resuming_another_configuration_is_refused(tiny):
    train(tiny(stages=("imitate",)))
    with pytest.raises(InputError, match="hidden"):
        train(tiny(stages=("imitate",), hidden=16, resume=True))


def test_starting_from_a_policy_takes_its_weights(finished, tiny):
    config = tiny("start", stages=("imitate",), imitate_epochs=1, imitate_learning_rate=1e-12, start=finished[0])
    started, start = Policy.load(train(config)), Policy.load(finished[0])
    for name in start.tensors:
        np.testing.assert_allclose(started.tensors[name], start.tensors[name], atol=1e-6)


def test_problems_of_models_are_trained_on(tiny, lanes):
    policy = Policy.load(train(tiny(stages=("imitate",)), model_problems=[lanes[0]]))
    assert "5 problems, 4 of them drawn" in policy.card


def test_bad_configurations_are_refused(tiny):
    with pytest.raises(InputError, match="fly"):
        tiny(stages=("fly",))
    with pytest.raises(InputError, match="problems is 0"):
        tiny(problems=0)
    with pytest.raises(InputError, match="--model"):
        train(tiny(stages=("measure",)))


def test_the_evaluation_says_what_the_policy_was_trained_on(finished):
    record = Policy.load(finished[0]).evaluation["training"]
    assert record["command"] == "autoplace train -o run" and record["training_problems"] == 4
    assert set(record["seconds"]) == {"imitate", "simulate"} and all(s > 0 for s in record["seconds"].values())
    assert "chain" in record["trained_on"]["families"] and "diamond" in record["held_out_of_training"]["families"]
    assert record["config"]["hidden"] == 8 and record["config"]["ppo"]["steps"] == 30


def test_teachers_are_not_searched_again(finished, tiny, monkeypatch):
    def interrupt(metrics, step):
        raise Interrupted

    with pytest.raises(Interrupted):
        train(tiny(), log=interrupt)
    monkeypatch.setattr("autoplace.agents.teachers.best_known", lambda *a, **k: pytest.fail("searched again"))
    assert same(Policy.load(finished[0]), Policy.load(train(tiny(resume=True))))


@pytest.mark.parametrize("part", ["imitation", "message-passing", "masks"])
def test_ablations_train_without_the_part(tiny, part):
    policy = Policy.load(train(tiny(part, without=(part,), imitate_epochs=1)))
    assert policy.config.message_passing == (part != "message-passing") and policy.config.masks == (part != "masks")
    assert f"without: {part}" in policy.card
    stages = policy.evaluation["training"]["stages"]
    assert stages == (["simulate"] if part == "imitation" else ["imitate", "simulate"])


def test_ablations_need_something_to_train_and_fresh_weights(tiny, tmp_path):
    with pytest.raises(InputError, match="no stage"):
        tiny(stages=("imitate",), without=("imitation",))
    with pytest.raises(InputError, match="fresh weights"):
        tiny(start=tmp_path, without=("masks",))
    with pytest.raises(InputError, match="wings"):
        tiny(without=("wings",))
    with pytest.raises(InputError, match="captured"):
        tiny(captured=1.5)
