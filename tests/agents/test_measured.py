import json
import math
from dataclasses import replace

import numpy as np
import pytest

from autoplace.agents.measured import MeasuredCase, ReferencedEvaluator
from autoplace.agents.plots import measured_reward_figure, read_measured_rewards
from autoplace.agents.train import train
from autoplace.errors import InfeasibleError
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.policy.policy import Policy
from autoplace.problem import Semantics
from autoplace.simulate.evaluator import SimulatedEvaluator


class DriftingMachine:
    """Real runs on a machine that gets slower with every call: the simulator's J times a factor that grows."""

    def __init__(self, problem):
        self.problem, self.simulator = problem, SimulatedEvaluator(problem)
        self.evaluations = self.calls = 0

    def evaluate(self, plans):
        self.calls += 1
        self.evaluations += len(plans)
        factor = 1.0 + 0.1 * self.calls
        objectives = [self.simulator.score(p.assignment_array(self.problem))[0] * factor for p in plans]
        return [Outcome(source="measured", latency_ms=j, objective=j) for j in objectives]


class Remembering(DriftingMachine):
    """Keeps what it was asked to run."""

    def __init__(self, problem):
        super().__init__(problem)
        self.plans = []

    def evaluate(self, plans):
        self.plans += plans
        return super().evaluate(plans)


class Broken:
    evaluations = 0

    def evaluate(self, plans):
        return [Outcome(source="measured", feasible=False, reason="no such device") for _ in plans]


def test_the_reference_is_the_best_baseline_and_drift_cancels(lanes):
    problem, fast = lanes
    machine = DriftingMachine(problem)
    evaluator = ReferencedEvaluator(MeasuredCase(problem=problem, evaluator=machine), remeasure=1.0)
    assert evaluator.reference == pytest.approx(8.0 * 1.1)
    slow = Plan.from_assignment(problem, 1 - fast, strategy="x")
    ratios = [evaluator.evaluate([slow])[0].objective / evaluator.reference for _ in range(3)]
    np.testing.assert_allclose(ratios, 3.0)


def test_known_plans_are_mostly_remembered_and_sometimes_measured_again(lanes):
    problem, fast = lanes
    machine = DriftingMachine(problem)
    evaluator = ReferencedEvaluator(MeasuredCase(problem=problem, evaluator=machine), remeasure=0.25)
    before, plan = machine.calls, Plan.from_assignment(problem, fast, strategy="x")
    for _ in range(100):
        assert evaluator.evaluate([plan])[0].objective == pytest.approx(evaluator.reference)
    assert 10 <= machine.calls - before <= 45
    assert evaluator.evaluations == 100


def test_no_baseline_that_runs_is_an_error_with_the_reason(lanes):
    with pytest.raises(InfeasibleError, match="no such device"):
        ReferencedEvaluator(MeasuredCase(problem=lanes[0], evaluator=Broken()))


def test_the_measured_stage_raises_the_measured_reward(lanes, tiny):
    problem, _ = lanes
    case = MeasuredCase(problem=problem, evaluator=DriftingMachine(problem))
    config = tiny(stages=("measure",), measure_plans=120, hidden=32)
    seen = []
    directory = train(config, measured=[case], log=lambda metrics, step: seen.append((step, metrics)))
    rewards = read_measured_rewards(config.output / "measured.jsonl")
    assert len(rewards) == 120
    assert np.mean(rewards[-16:]) > np.mean(rewards[:16]) + 0.1
    logged = [m["measure/reward"] for _, m in seen if "measure/reward" in m]
    assert logged == rewards and [s for s, _ in seen] == sorted(s for s, _ in seen)
    assert (directory / "policy.safetensors").exists()
    record = json.loads((config.output / "measured.jsonl").read_text().splitlines()[0])
    assert record["outcome"]["source"] == "measured" and len(record["assignment"]) == 8
    assert math.isfinite(record["reward"])


class Noisy(DriftingMachine):
    """Real runs with 10 % noise."""

    def __init__(self, problem):
        super().__init__(problem)
        self.random = np.random.default_rng(0)

    def evaluate(self, plans):
        factors = self.random.lognormal(0.0, 0.1, len(plans))
        return [
            replace(o, objective=o.objective * f)
            for o, f in zip(super().evaluate(plans), factors, strict=True)
        ]  # fmt: skip


def test_only_what_is_better_beyond_chance_is_confirmed(lanes):
    problem, fast = lanes
    best, worse = (Plan.from_assignment(problem, row, strategy="x") for row in (fast, 1 - fast))
    evaluator = ReferencedEvaluator(MeasuredCase(problem=problem, evaluator=Noisy(problem)))
    assert evaluator.confirmed(worse) is None, "nothing else has run"
    evaluator.evaluate([best, worse])
    assert evaluator.confirmed(worse) == best and evaluator.confirmed(None) == best
    assert evaluator.confirmed(best) is None


def test_placements_are_confirmed_whatever_they_ran_as(lanes):
    problem, fast = lanes
    best, worse = (Plan.from_assignment(problem, row, strategy="x") for row in (fast, 1 - fast))
    case = MeasuredCase(
        problem=problem,
        evaluator=Noisy(problem),
        as_run=lambda plan: plan.with_(channels_last=True, strategy="run"),
        teachers=[best],
    )
    assert ReferencedEvaluator(case).confirmed(worse) == best, "a teacher's"
    evaluator = ReferencedEvaluator(replace(case, teachers=[]))
    evaluator.evaluate([best, worse])
    assert evaluator.confirmed(worse) == best, "the training's"


class Contrary(DriftingMachine):
    """Real runs that are fast where the simulator expects them to be slow."""

    def evaluate(self, plans):
        turned = [1 - p.assignment_array(self.problem) for p in plans]
        return super().evaluate([Plan.from_assignment(self.problem, row, strategy="turned") for row in turned])


def test_the_best_that_ran_is_taught(lanes, tiny):
    problem, _ = lanes
    case = MeasuredCase(problem=problem, evaluator=Contrary(problem))
    config = tiny(stages=("measure",), measure_plans=20, hidden=32)
    policy = Policy.load(train(config, measured=[case]))
    lines = [json.loads(line) for line in (config.output / "measured.jsonl").read_text().splitlines()]
    score = SimulatedEvaluator(problem).score
    ran = min(score(1 - np.asarray(line["assignment"]))[0] for line in lines)
    assert score(1 - policy.greedy(problem))[0] <= ran


def test_the_plot_shows_every_plan_and_the_moving_average():
    figure = measured_reward_figure([0.0, -1.0, 1.0, 2.0], window=2)
    points, average, _ = figure.axes[0].lines
    assert list(points.get_ydata()) == [0.0, -1.0, 1.0, 2.0]
    np.testing.assert_allclose(average.get_xdata(), [2, 3, 4])
    np.testing.assert_allclose(average.get_ydata(), [-0.5, 0.0, 1.5])
    assert "ln(J reference / J)" in figure.axes[0].get_ylabel()


def test_one_device_runs_whole_batches_and_several_run_parts(lanes):
    problem = lanes[0].with_(semantics=Semantics(microbatches=2))
    machine = Remembering(problem)
    evaluator = ReferencedEvaluator(MeasuredCase(problem=problem, evaluator=machine))
    alone = Plan.from_assignment(problem, np.zeros(8, int), strategy="x")
    evaluator.evaluate([alone, Plan.from_assignment(problem, np.arange(8) % 2, strategy="x")])
    assert {plan.shape: plan.microbatches for plan in machine.plans} == {"single": 1, "stages": 2}


def test_plans_of_one_call_are_measured_beside_one_run_of_the_given_reference(lanes):
    problem, fast = lanes
    machine = Remembering(problem)
    slow = Plan.from_assignment(problem, 1 - fast, strategy="given")
    evaluator = ReferencedEvaluator(MeasuredCase(problem=problem, evaluator=machine, references=[slow]))
    assert evaluator.reference_plan == slow and machine.calls == 1
    plans = [Plan.from_assignment(problem, row, strategy="x") for row in (fast, fast, 1 - fast)]
    ratios = [o.objective / evaluator.reference for o in evaluator.evaluate(plans)]
    assert machine.calls == 2 and evaluator.measured == 1 + 2 and len(machine.plans) == 1 + 3
    np.testing.assert_allclose(ratios, [1 / 3, 1 / 3, 1.0])


def test_what_is_foretold_to_be_hopeless_is_not_run(lanes, tiny):
    problem, fast = lanes
    machine, simulator = Remembering(problem), SimulatedEvaluator(problem)

    def forecast(plan):
        return simulator.evaluate([plan])[0]

    best = Plan.from_assignment(problem, fast, strategy="given")
    case = MeasuredCase(problem=problem, evaluator=machine, references=[best], forecast=forecast, together=2)
    evaluator = ReferencedEvaluator(case)
    good, bad = evaluator.evaluate([best, Plan.from_assignment(problem, 1 - fast, strategy="x")])
    assert good.source == "measured" and bad.source == "simulated"
    assert bad.objective == pytest.approx(3 * evaluator.reference) and evaluator.measured == 1
    ended = []
    config = tiny(stages=("measure",), measure_plans=20, hidden=32)
    train(config, measured=[replace(case, done=lambda: ended.append(len(machine.plans)))])
    lines = [json.loads(line) for line in (config.output / "measured.jsonl").read_text().splitlines()]
    run = [line["reward"] for line in lines if line["outcome"]["source"] == "measured"]
    assert len(lines) == 20 and 0 <= len(run) < 20 and ended == [len(machine.plans)]
    assert read_measured_rewards(config.output / "measured.jsonl") == run


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "measured.jsonl"
    path.write_text('{"reward": 0.5}\n{"rew')
    assert read_measured_rewards(path) == [0.5]
