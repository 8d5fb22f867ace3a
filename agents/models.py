"""Problems made from a person's own models on a person's own cluster, to train on beside the synthetic ones."""

from __future__ import annotations

from collections.abc import Sequence

from autoplace.costs.build import build_problem
from autoplace.graph.capture import capture
from autoplace.graph.coarsen import coarsen
from autoplace.hardware.cluster import Cluster
from autoplace.problem import Objective, Problem, Semantics
from autoplace.workload import Workload

__all__ = ["model_problem", "variants"]

_SEMANTICS = (
    Semantics(),
    Semantics(microbatches=4),
    Semantics(transfers="blocking"),
    Semantics(contention="none", queue="priority"),
)


def model_problem(
    workload: Workload, cluster: Cluster, *, max_groups: int, objective: Objective | None = None
) -> Problem:
    """Capture a model, group its ops and measure or estimate every group on every device.

    Args:
        workload: Model, inputs and mode.
        cluster: The devices.
        max_groups: Most groups.
        objective: What the problem asks for; None = latency.
    """
    captured = capture(workload)
    grouping = coarsen(captured.graph, max_groups=max_groups, called=captured.called)
    name = f"{workload.name}-{grouping.graph.num_ops}"
    return build_problem(workload, grouping, cluster, objective=objective, name=name)[0]


def variants(problems: Sequence[Problem]) -> list[Problem]:
    """Return every problem under several goals and semantics; energy counts where every device states its watts."""
    found = []
    for problem in problems:
        watts = all(d.idle_watts is not None and d.busy_watts is not None for d in problem.cluster.devices)
        for weight in (0.0, 0.5) if watts else (0.0,):
            for goal in ("latency", "throughput"):
                for index, semantics in enumerate(_SEMANTICS):
                    objective = Objective(goal=goal, energy_weight=weight)
                    name = f"{problem.name}-{goal}-{weight}-{index}"
                    found.append(problem.with_(objective=objective, semantics=semantics, name=name))
    return found
