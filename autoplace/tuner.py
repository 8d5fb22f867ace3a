"""`tune()`: the whole road from a model to a measured plan.

    capture → discover → profile → propose → simulate → measure the best few → check → choose

It composes the rooms and holds no knowledge of its own about any of them; the rules by which a plan is kept are in
`autoplace.choose`. It reaches up to the zoo for the policy and for tracking, lazily.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from autoplace import choose as choosing
from autoplace.errors import InputError, PolicyError
from autoplace.hardware.cluster import Cluster
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.problem import Objective, Problem
from autoplace.result import Candidate, TuneResult
from autoplace.workload import Workload

__all__ = ["Progress", "TuneConfig", "tune"]

Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps done and the steps in all."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What to tune for, and how much may be spent."""

    objective: Objective = field(default_factory=Objective)
    """Latency, or latency and energy."""
    budget_s: float = 60.0
    """Wall seconds for the real runs that decide; planning comes on top."""
    policy: str | None = "default"
    """Name, directory or `models:/` URI of the learned policy; None plans without one."""
    microbatches: tuple[int, ...] = (1, 2, 4)
    """Numbers of microbatches that the strategies plan for."""
    evaluations: int = 2000
    """Simulated plans that each searching strategy may spend per number of microbatches."""
    max_groups: int = 64
    """Op groups that the planner places; at most 256."""
    measured_plans: int = 5
    """How many of the best predicted plans are measured."""
    rounds: int = 7
    """Interleaved rounds of the first measurement; the winner is confirmed with three times as many."""
    compile: bool = False
    """Whether plain `torch.compile` is a candidate too."""
    use_cache: bool = True
    """Whether measured costs of an earlier run may be used."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget_s <= 0:
            raise InputError(f"a tuning budget of {self.budget_s} s allows nothing; use more than 0")
        if not 1 <= self.max_groups <= 256:
            raise InputError(f"max_groups is {self.max_groups}; use 1 to 256")
        if self.measured_plans < 1 or self.rounds < 3:
            raise InputError("measured_plans must be 1 or more and rounds 3 or more")


class _Phases:
    """Times the phases and tells the user about them."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress or (lambda *_: None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Run one phase; yields a function that takes the steps done and the steps in all."""
        start = time.perf_counter()
        self._progress(name, 0, 1)
        yield lambda done, total: self._progress(name, done, total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._progress(name, 1, 1)


def tune(
    workload: Workload,
    config: TuneConfig | None = None,
    *,
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Find the plan under which a workload runs best on these devices.

    Args:
        workload: Model, example inputs, inference or training. The model is left as it was found.
        config: What to tune for.
        cluster: The devices; None discovers and measures this machine's.
        progress: Told about every phase.

    Returns:
        All candidates with predictions and measurements; `TuneResult.chosen` is never slower than plain PyTorch.

    Raises:
        InputError: If the model cannot run on the inputs.
        PolicyError: If the policy is unknown or damaged.
    """
    from autoplace.costs.build import build_problem
    from autoplace.graph.capture import capture
    from autoplace.graph.coarsen import coarsen

    config = config or TuneConfig()
    phases = _Phases(progress)
    with phases.phase("discover devices"):
        cluster = cluster or Cluster.discover()
    with phases.phase("capture the model"):
        captured = capture(workload)
        grouping = coarsen(captured.graph, max_groups=config.max_groups)
    with phases.phase("profile costs") as step:
        problem, costs = build_problem(
            workload,
            grouping,
            cluster,
            objective=config.objective,
            name=workload.name,
            progress=lambda _message, done, total: step(done, total),
            use_cache=config.use_cache,
        )
    with phases.phase("propose and simulate") as step:
        candidates, notes = _propose(problem, config, step)
    with phases.phase("measure") as step:
        candidates, noise = _measure(workload, cluster, config, candidates, step)
    labels = [str(label) for label in costs.labels.ravel()]
    return TuneResult(
        model_name=workload.name,
        mode="training" if workload.training else "inference",
        batch_size=workload.batch_size,
        objective=config.objective,
        cluster=cluster,
        candidates=tuple(candidates),
        noise=noise,
        capture_rung=captured.rung,
        capture_reason=captured.reason,
        num_ops=captured.graph.num_ops,
        num_groups=grouping.graph.num_ops,
        cost_labels={label: labels.count(label) for label in dict.fromkeys(labels)},
        seconds=phases.seconds,
        notes=(*notes, *costs.notes),
        environment=_environment(),
    )


def _environment() -> dict[str, str]:
    import autoplace

    return {
        "autoplace": autoplace.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads of plain PyTorch": str(torch.get_num_threads()),
    }


def _propose(
    problem: Problem, config: TuneConfig, step: Callable[[int, int], None]
) -> tuple[list[Candidate], list[str]]:
    """Ask every strategy for plans at every number of microbatches, and simulate them; best predicted first."""
    from autoplace.simulate import SimulatedEvaluator
    from autoplace.strategies import make_strategy, strategy_names
    from autoplace.strategies._base import Budget

    policy, notes = _policy(config)
    names = [n for n in strategy_names() if n != "learned" or policy is not None]
    counts = [m for m in config.microbatches if m <= problem.batch_size] or [1]
    found: dict[str, Candidate] = {}
    for position, count in enumerate(counts):
        variant = problem.with_(semantics=replace(problem.semantics, microbatches=count))
        for offset, name in enumerate(names):
            plans = make_strategy(name, policy=policy).propose(
                variant, budget=Budget(evaluations=config.evaluations, seconds=10.0), seed=config.seed
            )
            outcomes = SimulatedEvaluator(problem).evaluate(plans[:_KEPT_PER_STRATEGY], timeline=True)
            for plan, outcome in zip(plans, outcomes, strict=False):
                _remember(found, plan, outcome)
            step(position * len(names) + offset + 1, len(counts) * len(names))
    ranked = sorted(found.values(), key=lambda c: c.predicted.objective if c.predicted else float("inf"))
    return ranked, notes


_KEPT_PER_STRATEGY = 3
"""Plans of one strategy at one number of microbatches that are worth a row in the table."""


def _policy(config: TuneConfig) -> tuple[object | None, list[str]]:
    if config.policy is None:
        return None, ["Planned without a learned policy, as asked."]
    from autoplace.zoo import load_policy

    try:
        return load_policy(config.policy), []
    except PolicyError:
        if config.policy != "default":
            raise
        return None, ["Planned without a learned policy: none named 'default' is installed."]


def _remember(found: dict[str, Candidate], plan: Plan, outcome: Outcome) -> None:
    """Keep the first of equal plans, under a label of its own."""
    if plan.shape in ("single", "replicas"):
        plan = plan.with_(microbatches=1)
    key = repr((plan.replicas, plan.microbatches, sorted(plan.threads.items()), plan.compiled))
    if key in found:
        return
    label = _label(plan)
    taken = {c.label for c in found.values()}
    if label in taken:
        label = next(f"{label} ({i})" for i in range(2, len(taken) + 3) if f"{label} ({i})" not in taken)
    found[key] = Candidate(label=label, plan=plan, predicted=outcome)


def _label(plan: Plan) -> str:
    if plan.shape == "single":
        device = plan.devices[0]
        threads = plan.threads.get(device)
        return f"single {device}" + (f" {threads} threads" if threads else "")
    if plan.shape == "replicas":
        return "replicas " + "/".join(f"{r.share:.2f}" for r in plan.replicas)
    return f"{plan.strategy} x{plan.microbatches}"


def _select(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Pick the plans worth real runs: the best of each shape, the learned policy's best, then the best predicted."""
    able = [c for c in candidates if c.predicted is not None and c.predicted.feasible]
    picked: list[Candidate] = []
    for shape in ("replicas", "stages", "single", "hybrid"):
        picked += [c for c in able if c.plan.shape == shape][:1]
    picked += [c for c in able if c.plan.strategy == "learned"][:1]
    unique = {id(c): c for c in [*picked, *able]}
    return list(unique.values())[:count]


def _measure(
    workload: Workload,
    cluster: Cluster,
    config: TuneConfig,
    candidates: Sequence[Candidate],
    step: Callable[[int, int], None],
) -> tuple[list[Candidate], float]:
    """Measure the best few beside plain PyTorch, then confirm the winner in a run of its own."""
    from autoplace.measure.evaluator import MeasuredEvaluator

    evaluator = MeasuredEvaluator(workload, cluster, objective=config.objective, limit_s=config.budget_s / 6)
    chosen = _select(candidates, config.measured_plans)
    if config.compile:
        chosen.append(Candidate(label="plain torch.compile", plan=Plan.plain().with_(compiled=True)))
    step(0, 2)
    measured, noise = _against_plain(evaluator, config, chosen, config.rounds)
    step(1, 2)
    confirmed: set[str] = set()
    while True:
        best = next(c for c in choosing.choose(measured, noise=noise) if c.kept)
        if best.label == measured[0].label or best.label in confirmed:
            break
        # The best of several short runs is flattered by chance; its row shows a longer run of its own.
        (_, row), noise_again = _against_plain(evaluator, config, [best], 3 * config.rounds)
        noise = max(noise, noise_again)
        confirmed.add(best.label)
        measured = [row if c.label == best.label else c for c in measured]
    step(2, 2)
    by_label = {c.label: c for c in measured}
    rest = [by_label.get(c.label, c) for c in candidates]
    extra = [c for c in measured[1:] if c.label not in {r.label for r in rest}]
    return choosing.choose([measured[0], *extra, *rest], noise=noise), noise


def _against_plain(
    evaluator: object, config: TuneConfig, chosen: Sequence[Candidate], rounds: int
) -> tuple[list[Candidate], float]:
    """Measure plans interleaved with plain PyTorch, which runs twice a round; returns plain first, and the noise."""
    plans = [Plan.plain(), Plan.plain(), *(c.plan for c in chosen)]
    plain, again, *outcomes = evaluator.evaluate_interleaved(plans, rounds)  # type: ignore[attr-defined]
    if not plain.feasible:
        raise InputError(f"plain PyTorch cannot run this model on these inputs: {plain.reason}")
    rows = [
        Candidate(label="plain PyTorch", plan=Plan.plain(), measured=plain, speedup=1.0, gain=1.0, check="reference")
    ]
    for candidate, outcome in zip(chosen, outcomes, strict=True):
        ratio = choosing.compare(plain, outcome, config.objective)
        rows.append(
            replace(
                candidate,
                measured=outcome,
                speedup=ratio.speedup if ratio else None,
                speedup_interval=ratio.speedup_interval if ratio else None,
                gain=ratio.gain if ratio else None,
                gain_low=ratio.gain_low if ratio else None,
                check="same outputs" + (" and gradients" if evaluator.workload.training else "")  # type: ignore[attr-defined]
                if outcome.feasible
                else outcome.reason,
            )
        )
    return rows, choosing.noise_of(plain, again)
