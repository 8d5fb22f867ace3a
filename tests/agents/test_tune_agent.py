import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import pytest

from autoplace.agents import short_runs
from autoplace.agents.ppo import PpoConfig
from autoplace.agents.ppo_file import load_ppo, save_ppo
from autoplace.agents.ppo_space import SEARCHED
from autoplace.agents.short_runs import CHECKS, ShortRuns, compare_paired
from autoplace.agents.tune_agent import TuneAgentConfig, tune_agent
from autoplace.errors import InputError
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy

BASE = PpoConfig(envs=2, steps=8, batch_size=64, epochs=1, warmup_updates=0)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start") / "policy"
    Policy.of(PolicyNetwork(PolicyConfig(hidden=8), seed=0)).save(directory, card="a start", evaluation={})
    return directory


@pytest.fixture
def small(tmp_path, start):
    def make(name="study", **changes):
        settings = {"trials": 3, "steps": 256, "problems": 3, "instances": 8, "confirmations": 1}
        sizes = {"max_ops": 12, "max_devices": 3}
        return TuneAgentConfig(output=tmp_path / name, start=start, base=BASE, **(settings | sizes | changes))

    return make


@pytest.fixture
def synthetic(monkeypatch):
    """Runs without training: a reward per instance that the learning rate alone decides, and a count of the parts."""
    parts = []

    def run(self, ppo, key, *, check=None, report=None):
        noise = np.random.default_rng(key).normal(0.0, 0.01, len(self))
        values = (noise - abs(np.log(ppo.learning_rate / BASE.learning_rate)) + np.arange(len(self))).tolist()
        for part in range(CHECKS):
            parts.append(key)
            if check is not None and check([(i, values[i]) for i in range(part, len(self), CHECKS)]):
                return None
        return values

    monkeypatch.setattr(ShortRuns, "run", run)
    return parts


def drawn(result):
    return sorted((row.number, row.state, tuple(asdict(row.ppo).items()), row.value) for row in result.trials)


def test_a_study_trains_compares_and_writes_a_file(small):
    opened, logged = [], {}

    @contextmanager
    def open_trial(number, params):
        class Log:
            def log_metrics(self, metrics, step=None):
                logged.setdefault(number, set()).update(metrics)

        opened.append((number, params["ppo.learning_rate"]))
        yield Log()

    config = small(trials=2)
    result = tune_agent(config, open_trial=open_trial)
    assert [number for number, _ in opened] == [0, 1] and opened[0][1] == BASE.learning_rate
    assert {"ppo/reward", "instance/log_ratio", "trial/seconds", "validation/reward"} <= logged[0]
    first = next(row for row in result.trials if row.number == 0)
    assert first.ppo == BASE and first.state == "complete" and first.reported == 8
    others = [row.ppo for row in result.trials if row.number]
    assert all(any(getattr(ppo, name) != getattr(BASE, name) for name in SEARCHED) for ppo in others)
    values = [row.value for row in result.trials if row.value is not None]
    assert values == sorted(values, reverse=True)
    assert load_ppo(config.output / "best.json") == result.ppo
    facts = json.loads(result.path.read_text())["provenance"]
    assert facts["study"]["steps"] == 256 and sum(facts["trials"].values()) == 2
    # The same weights and the same draws give the same figures, by themselves and in a study that goes on.
    tune_agent(small("parts", trials=1))
    assert drawn(tune_agent(small("parts", trials=2, confirmations=0))) == drawn(result)


def test_without_a_start_it_imitates_once(tmp_path):
    config = TuneAgentConfig(
        output=tmp_path, trials=1, steps=256, problems=3, instances=4, max_ops=12, max_devices=3, imitate_epochs=1,
        base=BASE,
    )  # fmt: skip
    tune_agent(config)
    made = (tmp_path / "start" / "policy" / "policy.safetensors").stat().st_mtime_ns
    tune_agent(replace(config, trials=2, confirmations=0))
    assert (tmp_path / "start" / "policy" / "policy.safetensors").stat().st_mtime_ns == made


def test_clearly_worse_trials_are_pruned_before_their_training_ends(small, synthetic):
    result = tune_agent(small(trials=12, instances=24))
    states = [row.state for row in result.trials]
    pruned = [row for row in result.trials if row.state == "pruned"]
    assert len(pruned) >= 5 and states.count("complete") + len(pruned) == 12
    assert all(row.value is None and row.reported < 24 for row in pruned)
    assert result.trials[0].value == max(row.value for row in result.trials if row.value is not None)
    # Nothing can beat the first trial's learning rate by more than noise.
    assert abs(np.log(result.ppo.learning_rate / BASE.learning_rate)) < 0.2


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(small, synthetic, monkeypatch):
    whole = tune_agent(small("whole", trials=10))
    run = ShortRuns.run

    def interrupt(self, ppo, key, **rest):
        if key[1:] == (1, 4):
            raise KeyboardInterrupt
        return run(self, ppo, key, **rest)

    monkeypatch.setattr(ShortRuns, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune_agent(small("cut", trials=10))
    monkeypatch.setattr(ShortRuns, "run", run)
    resumed = tune_agent(small("cut", trials=10))
    assert [row.number for row in resumed.trials if row.state == "fail"] == [4]
    ended = [entry[1:] for entry in drawn(resumed) if entry[1] != "fail"]
    assert ended == [entry[1:] for entry in drawn(whole)] and resumed.confirmation == whole.confirmation


def test_what_wins_again_is_kept(small, monkeypatch):
    def run(self, ppo, key, *, check=None, report=None):
        return [0.01 * i * (ppo != BASE) for i in range(len(self))]

    monkeypatch.setattr(ShortRuns, "run", run)
    result = tune_agent(small(trials=2))
    assert result.tuned and result.ppo != BASE and result.ppo == load_ppo(result.path)
    assert result.confirmation["p"] < 0.05 and result.confirmation["seeds"] == 1


def test_what_does_not_win_again_is_not_kept(small, monkeypatch):
    def run(self, ppo, key, *, check=None, report=None):
        lucky = key[1] == 1 and ppo != BASE
        values = [float(lucky == (key[1] == 1)) + 0.01 * i for i in range(len(self))]
        if ppo == BASE and key[1] == 2:
            values = [v + 5.0 for v in values]
        if check is not None:
            check(list(enumerate(values)))
        return values

    monkeypatch.setattr(ShortRuns, "run", run)
    result = tune_agent(small())
    assert result.search["gain"] > 1.0 > result.confirmation["gain"]
    assert not result.tuned and result.ppo == BASE == load_ppo(result.path)


def test_another_study_and_a_folder_in_use_are_refused(small, synthetic):
    from filelock import FileLock

    config = small(trials=1)
    tune_agent(config)
    with pytest.raises(InputError, match="seed 0, not 1"):
        tune_agent(replace(config, seed=1))
    with FileLock(config.output / "study.lock"), pytest.raises(InputError, match="in use"):
        tune_agent(config)
    (config.output / "study.journal").write_text("garbage\n" * 3)
    with pytest.raises(InputError, match=r"study\.journal is no journal"):
        tune_agent(config)


@pytest.mark.parametrize(("name", "value"), [("trials", 0), ("instances", 3), ("steps", 255), ("confirmations", -1)])
def test_bad_settings_are_refused(small, name, value):
    with pytest.raises(InputError, match=f"{name} is {value}"):
        small(**{name: value})


def test_every_run_trains_equally_long(start, monkeypatch):
    from autoplace.agents.distribution import training_problems

    chunks = []

    class Trainer:
        def __init__(self, network, problems, config, **rest):
            self.config = config

        def run_chunk(self, seed, *, learning_rate):
            chunks.append((self.config.chunk_steps, seed, learning_rate))

        def close(self):
            pass

    monkeypatch.setattr(short_runs, "PpoTrainer", Trainer)
    drawn = training_problems(4, seed=0, max_ops=12, max_devices=3)
    runs = ShortRuns(Policy.load(start), drawn, drawn, steps=256, max_devices=3)
    for envs, steps in ((1, 2), (2, 8), (4, 16)):
        chunks.clear()
        runs.run(replace(BASE, envs=envs, steps=steps), (0, 0))
        assert [size for size, _, _ in chunks] == [64] * CHECKS
        assert len({seed for _, seed, _ in chunks}) == CHECKS
        rates = [rate for _, _, rate in chunks]
        assert rates[0] == BASE.learning_rate and rates == sorted(rates, reverse=True)


def test_paired_comparison_is_the_signed_rank_test():
    one, other = np.arange(8.0), np.arange(8.0) - np.arange(1, 9) / 100
    figures = compare_paired([one], [other])
    assert figures["p"] == pytest.approx(1 / 2**8)
    assert figures["gain"] == pytest.approx(np.exp(0.045)) and figures["instances"] == 8
    assert compare_paired([other], [one])["p"] == pytest.approx(1.0)
    assert compare_paired([one], [one])["gain"] == 1.0


def test_hyperparameters_survive_the_file(tmp_path):
    path = tmp_path / "best.json"
    for ppo in (PpoConfig(), replace(BASE, target_kl=None, learning_rate=1 / 3, envs=7)):
        save_ppo(path, ppo, provenance={"tuned": True})
        assert load_ppo(path) == ppo
    data = json.loads(path.read_text())
    for change, sentence in [
        ({"speed": 1}, "no 'speed'"),
        ({"envs": 1.5}, "whole number"),
        ({"batch_size": 0}, "batch_size is 0; use a whole number, 1 or more"),
        ({"learning_rate": "fast"}, "use a number"),
        ({"learning_rate": -1.0}, "0 or more"),
        ({"clip_range": None}, "use a number"),
    ]:
        path.write_text(json.dumps({**data, "ppo": {**data["ppo"], **change}}))
        with pytest.raises(InputError, match=sentence):
            load_ppo(path)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"autoplace\.ppo/1"):
        load_ppo(path)
