"""`train`: from nothing, or from a policy, to a policy directory, in up to three stages.

    imitate   → `imitation.clone_epoch`, one epoch a chunk: the best plans of heuristics and annealing
    simulate  → `ppo.PpoTrainer`: PPO whose reward is the simulator's
    measure   → `ppo.PpoTrainer` over `measured.ReferencedEvaluator`: PPO whose reward is real runs; then imitation of
                the best that ran, where it is better than what the policy proposes

After every chunk stands a checkpoint; resuming from it gives what an uninterrupted run gives (the measured stage
excepted, for no two real runs are equal). Runs without MLflow; metrics go to a callback.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoplace.envs import ProblemCache
from autoplace.errors import InfeasibleError, InputError
from autoplace.plan import Plan
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem import Problem

from .captured import available
from .card import TrainingFacts, training_record, write_card
from .checkpoints import Checkpoint, Checkpoints
from .distribution import held_out_problems, training_problems
from .evaluate import Bench
from .experience import Experience
from .imitation import Demonstrations, clone_epoch, demonstrate
from .measured import MeasuredCase, ReferencedEvaluator, measured_config
from .ppo import PpoConfig, PpoTrainer, single_thread
from .teachers import TeacherFile, search_teachers
from .train_config import PARTS, STAGES, TrainConfig

__all__ = ["PARTS", "STAGES", "TrainConfig", "train"]

Log = Callable[[dict[str, float], int], None]
Progress = Callable[[str, int, int], None]
_TAUGHT_EPOCHS, _TAUGHT = 200, 0.05
"""Passes over the best measured plans, at most, and the loss (nats a decision) at which they end."""
_PROFILES, _PROFILE_NOISE = 8, 0.1
"""Profiles of a problem that its best plan is taught for, and by how much the speeds of devices differ between them
(standard deviation of the logarithm): another profile of the same machine does not find the same either."""
_TEACHERS_KEPT = 50
"""Teachers found between two writes of their file."""


def train(
    config: TrainConfig,
    *,
    model_problems: Sequence[Problem] = (),
    measured: Sequence[MeasuredCase] = (),
    experience: Sequence[Experience] = (),
    log: Log | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a policy.

    Args:
        config: What and how long.
        model_problems: Problems of a person's own models; a quarter of the training looks at them.
        measured: Problems that can be run for real, for the stage `measure`.
        experience: Problems of earlier tunings with their best measured plans, which imitation takes as its teachers.
        log: Called with metrics and a running step.
        progress: Called with phase, done, total.

    Returns:
        The policy directory, `output/policy`.

    Raises:
        InputError: If the stage `measure` has nothing to run, or the checkpoint is of another configuration.
    """
    single_thread()
    if "measure" in config.stages and not measured:
        raise InputError("the stage measure needs a model to run; pass --model file.py:function")
    return _Training(config, list(model_problems), list(measured), list(experience), log, progress).run()


class _Training:
    """One training under way."""

    def __init__(
        self,
        config: TrainConfig,
        model_problems: list[Problem],
        measured: list[MeasuredCase],
        experience: list[Experience],
        log: Log | None,
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.measured = measured
        self.taught = {id(e.problem): e.assignment for e in experience}
        model_problems = model_problems + [e.problem for e in experience]
        self.log = log or (lambda metrics, step: None)
        self.progress = progress or (lambda phase, done, total: None)
        devices = [p.num_devices for p in model_problems] + [c.problem.num_devices for c in measured]
        self.max_devices = max([config.max_devices, *devices])
        self.captured = config.captured if available() else 0.0
        imagined = set(config.ordered_stages) - {"measure"}
        drawn = self._draw(training_problems, config.problems, config.seed) if imagined else []
        repeats = math.ceil(config.problems / 3 / len(model_problems)) if model_problems else 0
        self.problems = drawn + model_problems
        self.weighted = drawn + model_problems * repeats
        self.network = self._network()
        self.identity = _identity(config, self.captured, model_problems, measured)
        self.checkpoints = Checkpoints(config.output / "checkpoints", self.identity)
        self.stages = config.ordered_stages
        self.at = Checkpoint(stage=self.stages[0], weights=self.network.tensors())
        self._bench: Bench | None = None
        self._since = time.perf_counter()

    def _draw(self, draw: Callable[..., list[Problem]], count: int, seed: int) -> list[Problem]:
        """Draw problems of one side of the split."""
        config = self.config
        return draw(count, seed=seed, max_ops=config.max_ops, max_devices=config.max_devices, captured=self.captured)

    @property
    def bench(self) -> Bench:
        """The validation problems; none of them is trained on, all are of the training families."""
        if self._bench is None:
            drawn = self._draw(training_problems, self.config.validation, self.config.seed + 1_000_003)
            self._bench = Bench(drawn)
        return self._bench

    def run(self) -> Path:
        """Run all stages and write the policy."""
        if not self.config.resume:
            self.checkpoints.clear()
        elif (found := self.checkpoints.latest()) is not None:
            self.at = found
            self.network.load_tensors(found.weights)
        for stage in self.stages[self.stages.index(self.at.stage) :]:
            if stage != self.at.stage:
                at = self.at
                self.at = Checkpoint(stage=stage, weights=self.network.tensors(), step=at.step, seconds=at.seconds)
            self._since = time.perf_counter()
            getattr(self, f"_{stage}")()
            if self.at.best:
                self.network.load_tensors(self.at.best)
        return self._finish()

    def _network(self) -> PolicyNetwork:
        if self.config.start is not None:
            return Policy.load(self.config.start).network()
        without = self.config.without
        shape = PolicyConfig(
            hidden=self.config.hidden, message_passing="message-passing" not in without, masks="masks" not in without
        )
        return PolicyNetwork(shape, seed=self.config.seed)

    def _keep(self, chunk: int, metrics: dict[str, float], optimizer: dict[str, Any], *, validate: bool) -> None:
        """Validate the network as it is, log, and write a checkpoint."""
        at = self.at
        at.weights, at.chunk, at.optimizer = self.network.tensors(), chunk, optimizer
        at.step += 1
        now = time.perf_counter()
        at.seconds[at.stage] = at.seconds.get(at.stage, 0.0) + now - self._since
        self._since = now
        if validate:
            value = self.bench.log_ratio(Policy.of(self.network))
            metrics = {**metrics, "validation/reward": value}
            if value > at.best_value:
                at.best, at.best_value = at.weights, value
        self.log(metrics, at.step)
        self.checkpoints.save(at)

    def _imitate(self) -> None:
        config, data = self.config, self._demonstrations()
        optimizer = torch.optim.Adam(self.network.parameters(), lr=config.imitate_learning_rate)
        if self.at.optimizer is not None:
            optimizer.load_state_dict(dict(self.at.optimizer))
        for epoch in range(self.at.chunk, config.imitate_epochs):

            def rate(part: float, epoch: int = epoch) -> float:
                done = (epoch + part) / config.imitate_epochs
                return config.imitate_learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))

            metrics = clone_epoch(self.network, optimizer, data, seed=config.seed * 1009 + epoch, schedule=rate)
            self._keep(epoch + 1, metrics, optimizer.state_dict(), validate=True)
            self.progress("imitate", epoch + 1, config.imitate_epochs)

    def _demonstrations(self) -> Demonstrations:
        """Search the teachers' placements, where no real run has found them, and replay them."""
        config, total = self.config, len(self.problems)
        file = TeacherFile(config.output / "checkpoints" / "teachers.npz", self.identity, self.problems)
        teachers = file.load() if config.resume else []
        tasks = [(p, config.seed + i) for i, p in enumerate(self.problems) if id(p) not in self.taught]
        first = sum(id(p) not in self.taught for p in self.problems[: len(teachers)])
        found = search_teachers(tasks[first:], evaluations=config.teacher_evaluations, workers=config.workers)
        for index in range(len(teachers), total):
            known = self.taught.get(id(self.problems[index]))
            teachers.append(next(found) if known is None else known)
            self.progress("search for teachers", index + 1, total)
            if index % _TEACHERS_KEPT == 0 or index == total - 1:
                file.save(teachers)
        found.close()
        masks = self.network.config.masks
        return demonstrate(self.problems, teachers, hard_masks=masks)

    def _simulate(self) -> None:
        config = self.config
        chunks = math.ceil(config.simulate_steps / config.ppo.chunk_steps)
        trainer = self._trainer(self.weighted, config.ppo, ProblemCache())
        for chunk in range(self.at.chunk, chunks):
            rate = config.ppo.learning_rate * (1.0 - 0.9 * chunk / chunks)
            trainer.run_chunk(config.seed * 1_000_003 + chunk, learning_rate=rate)
            self.at.updates = trainer.updates
            self._keep(chunk + 1, {"simulate/learning_rate": rate}, dict(trainer.optimizer_state or {}), validate=True)
            self.progress("simulate", chunk + 1, chunks)
        trainer.close()

    def _measure(self) -> None:
        config = self.config
        steps = [len(np.unique(_classes(c.problem))) for c in self.measured]
        ppo = measured_config(max(steps), together=max(c.together for c in self.measured))
        chunks = math.ceil(config.measure_plans / max(1, ppo.envs * ppo.steps // max(steps)))
        cache, evaluators = _measured_cache(self.measured, config.seed)
        records = config.output / "measured.jsonl"
        if self.at.chunk == 0:
            records.unlink(missing_ok=True)
            if config.start is not None:
                self.network.soften(max(c.temperature for c in self.measured))
        rewards: list[float] = []
        plans = 0

        def episode(info: dict[str, Any]) -> None:
            nonlocal plans
            plans += 1
            self.at.step += 1
            outcome = info.get("outcome")
            if outcome is None or outcome.source == "measured":  # what was foretold is no measurement
                rewards.append(info["log_ratio"])
                average = float(np.mean(rewards[-10:]))
                self.log({"measure/reward": rewards[-1], "measure/reward_mean_of_10": average}, self.at.step)
            _append(records, info)
            self.progress("measure", min(plans, config.measure_plans), config.measure_plans)

        trainer = self._trainer([c.problem for c in self.measured], ppo, cache, episode)
        for chunk in range(self.at.chunk, chunks):
            trainer.run_chunk(config.seed * 1_000_003 + 500_000 + chunk)
            self.at.updates = trainer.updates
            runs = float(sum(e.measured for e in evaluators))
            self._keep(chunk + 1, {"measure/runs": runs}, dict(trainer.optimizer_state or {}), validate=False)
        trainer.close()
        self._teach(evaluators)
        self._keep(self.at.chunk, {}, dict(self.at.optimizer or {}), validate=False)
        for case in self.measured:
            case.done()

    def _teach(self, evaluators: Sequence[ReferencedEvaluator]) -> None:
        """Clone the training's best plans where they run better than what the policy proposes."""
        policy = Policy.of(self.network)
        teachers: list[np.ndarray | None] = []
        for case, evaluator in zip(self.measured, evaluators, strict=True):
            try:
                own = Plan.from_assignment(case.problem, policy.greedy(case.problem), strategy="learned")
            except InfeasibleError:
                own = None
            plan = evaluator.confirmed(own)
            teachers.append(None if plan is None else plan.assignment_array(case.problem))
        if all(teacher is None for teacher in teachers):
            return
        random = np.random.default_rng(self.config.seed)
        problems = [problem for case in self.measured for problem in _profiles(case.problem, random)]
        taught = [teacher for teacher in teachers for _ in range(_PROFILES)]
        data = demonstrate(problems, taught, hard_masks=self.network.config.masks)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.config.imitate_learning_rate)
        for epoch in range(_TAUGHT_EPOCHS):
            if clone_epoch(self.network, optimizer, data, seed=epoch)["imitate/loss"] < _TAUGHT:
                break

    def _trainer(
        self,
        problems: Sequence[Problem],
        ppo: PpoConfig,
        cache: ProblemCache,
        on_episode: Callable[[dict[str, Any]], None] | None = None,
    ) -> PpoTrainer:
        def report(metrics: dict[str, float]) -> None:
            self.at.step += 1
            self.log(metrics, self.at.step)

        trainer = PpoTrainer(
            self.network,
            problems,
            ppo,
            max_devices=self.max_devices,
            cache=cache,
            report=report,
            on_episode=on_episode,
        )
        trainer.updates, trainer.optimizer_state = self.at.updates, self.at.optimizer
        return trainer

    def _finish(self) -> Path:
        """Evaluate on held-out problems and write the policy directory."""
        config = self.config
        policy = Policy.of(self.network)
        bench = Bench(self._draw(held_out_problems, config.held_out, config.seed))
        self.progress("evaluate", 0, 2)
        greedy = bench.compare(policy)
        self.progress("evaluate", 1, 2)
        figures = {"held_out_greedy": greedy, "held_out_32_samples": bench.compare(policy, samples=32)}
        self.progress("evaluate", 2, 2)
        ratios = {f"held_out/{name}": r["geometric_mean"] for name, r in greedy["ratio"].items()}
        self.log(ratios, self.at.step + 1)
        target = config.output / "policy"
        facts = TrainingFacts(problems=len(self.problems), captured=self.captured, seconds=dict(self.at.seconds))
        evaluation = {**figures, "training": training_record(config, facts)}
        card = write_card(config, facts, figures)
        policy.save(target, card=card, evaluation=evaluation)
        return target


def _profiles(problem: Problem, random: np.random.Generator) -> list[Problem]:
    """Return a problem as it was profiled, and as it might have been."""
    factors = random.lognormal(0.0, _PROFILE_NOISE, (_PROFILES - 1, 1, problem.num_devices))
    return [problem, *(problem.with_(latency_ms=problem.latency_ms * factor) for factor in factors)]


def _classes(problem: Problem) -> np.ndarray:
    """Return a number per op that co-located ops share."""
    colocate = problem.graph.colocate
    return np.where(colocate >= 0, colocate, -1 - np.arange(problem.num_ops))


def _identity(
    config: TrainConfig, captured: float, model_problems: Sequence[Problem], measured: Sequence[MeasuredCase]
) -> dict[str, Any]:
    """Return what must be the same for a run to be resumed."""
    facts = {k: v for k, v in asdict(config).items() if k not in ("output", "resume", "command", "start", "workers")}
    facts["captured"] = captured
    facts["start"] = None if config.start is None else str(config.start)
    facts["models"] = [p.graph.fingerprint for p in model_problems]
    facts["measured"] = [c.problem.graph.fingerprint for c in measured]
    return facts


def _measured_cache(cases: Sequence[MeasuredCase], seed: int) -> tuple[ProblemCache, list[ReferencedEvaluator]]:
    """Return a cache whose evaluators are real runs and whose references are measured, and those evaluators."""
    evaluators = {id(c.problem): ReferencedEvaluator(c, seed=seed) for c in cases}
    cache = ProblemCache(lambda p: evaluators[id(p)], lambda p: evaluators[id(p)].reference)
    return cache, list(evaluators.values())


def _append(path: Path, info: dict[str, Any]) -> None:
    """Append an episode to the record: one JSON line, flushed."""
    outcome = info.get("outcome")
    record = {
        "problem": info["problem"],
        "reward": info["log_ratio"],
        "feasible": info["feasible"],
        "reason": info.get("reason", ""),
        "assignment": np.asarray(info["assignment"]).tolist(),
        "outcome": outcome.to_json() if outcome is not None else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
