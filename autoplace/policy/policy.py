"""`Policy`: a trained network as data, and placements by it. No torch module is needed to run one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoplace.errors import InfeasibleError, InputError, PolicyError
from autoplace.policy.network import PolicyConfig, PolicyNetwork, parameter_shapes, silenced
from autoplace.policy.rollout import follow, roll
from autoplace.policy.scorer import pack_weights
from autoplace.policy.store import read_policy, write_policy
from autoplace.policy.tables import Tables, build_tables
from autoplace.problem import Problem

__all__ = ["Policy"]


class Policy:
    """The learned policy: weights, their configuration, and what is known of them."""

    def __init__(
        self,
        config: PolicyConfig,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        card: str = "",
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        """Check and keep the weights.

        Args:
            config: Shape of the network.
            tensors: Name to array, as `PolicyNetwork.tensors` returns them.
            card: Markdown: how it was trained.
            evaluation: JSON-ready figures on held-out problems.

        Raises:
            PolicyError: If a tensor is missing, has another shape or holds a number that is not finite.
        """
        for name, shape in parameter_shapes(config).items():
            found = tensors[name].shape if name in tensors else None
            if found != shape:
                raise PolicyError(f"the policy's tensor {name!r} has shape {found}, expected {shape}; train it again")
            if not np.isfinite(tensors[name]).all():
                raise PolicyError(f"the policy's tensor {name!r} holds NaN or infinity; train it again")
        self.config = config
        self.tensors = silenced(config, {name: tensors[name] for name in parameter_shapes(config)})
        self.card = card
        self.evaluation = dict(evaluation or {})
        self._weights = pack_weights(self.tensors)

    @staticmethod
    def of(network: PolicyNetwork, *, card: str = "", evaluation: Mapping[str, Any] | None = None) -> Policy:
        """Return the policy that a network is now; later changes of the network do not reach it."""
        return Policy(network.config, network.tensors(), card=card, evaluation=evaluation)

    def network(self) -> PolicyNetwork:
        """Return a torch network with these weights, for training on."""
        network = PolicyNetwork(self.config)
        network.load_tensors(self.tensors)
        return network

    def save(
        self, directory: str | Path, *, card: str | None = None, evaluation: Mapping[str, Any] | None = None
    ) -> None:
        """Write the policy directory: weights, configuration, card, evaluation and checksums.

        Args:
            directory: Where; made if needed.
            card: Replaces the policy's card.
            evaluation: Replaces the policy's evaluation.
        """
        write_policy(
            directory,
            self.tensors,
            asdict(self.config),
            self.card if card is None else card,
            self.evaluation if evaluation is None else dict(evaluation),
        )

    @staticmethod
    def load(directory: str | Path) -> Policy:
        """Read a policy directory; nothing in it is executed.

        Raises:
            PolicyError: If it is missing, incomplete, fails its checksum, or was trained on other features.
        """
        stored = read_policy(directory)
        known = set(PolicyConfig.__dataclass_fields__)
        try:
            config = PolicyConfig(**{key: value for key, value in stored.config.items() if key in known})
        except TypeError as error:
            raise PolicyError(f"{directory} has a malformed config.json ({error}); train the policy again") from None
        return Policy(config, stored.tensors, card=stored.card, evaluation=stored.evaluation)

    def greedy(self, problem: Problem, *, tables: Tables | None = None) -> NDArray[np.int32]:
        """Place every op on the device that scores best, one co-location class after another.

        Args:
            problem: What to place.
            tables: Its tables, where they are known already.

        Returns:
            int32[N] device indices.

        Raises:
            InfeasibleError: If at some point no device is allowed.
        """
        found = self.sample(problem, 1, temperature=0.0, tables=tables)
        if len(found) == 0:
            raise InfeasibleError(
                f"the policy found no device for some op of {problem.name!r}; give the devices more memory or links"
            )
        return found[0]

    def sample(
        self,
        problem: Problem,
        count: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        tables: Tables | None = None,
    ) -> NDArray[np.int32]:
        """Draw placements from the policy.

        Args:
            problem: What to place.
            count: Placements to draw.
            seed: Of the draws.
            temperature: Of the softmax over the devices' scores; 0 = greedy.
            tables: The problem's tables, where they are known already.

        Returns:
            int32[P, N] device indices, P <= count: draws that ended without an allowed device are left out.
        """
        tables = build_tables(problem) if tables is None else tables
        return roll(tables, self._weights, count=count, temperature=temperature, seed=seed, masks=self.config.masks)

    def prior(
        self, problem: Problem, assignment: NDArray[np.int32], *, tables: Tables | None = None
    ) -> NDArray[np.float32]:
        """Return how likely the policy finds each device for each op, all decisions before it as in a placement.

        Args:
            problem: What is placed.
            assignment: int32[N] device indices, followed decision by decision, against the mask too.
            tables: The problem's tables, where they are known already.

        Returns:
            float32[N, D]: masked softmax of the scores at temperature 1, rows sum to 1; co-located ops share a row.
            Where no device is allowed, and after an op on a device that cannot run it, a row is uniform over the
            devices that can.

        Raises:
            InputError: If the assignment has another length or names a device that is not there.
        """
        tables = build_tables(problem) if tables is None else tables
        rows = follow(tables, self._weights, _actions(problem, tables, assignment), masks=self.config.masks)
        return rows[tables.class_of]

    def resample(
        self,
        problem: Problem,
        assignment: NDArray[np.int32],
        free: NDArray[np.bool_],
        count: int,
        *,
        seed: int,
        temperature: float = 1.0,
        tables: Tables | None = None,
    ) -> NDArray[np.int32]:
        """Draw placements in which the policy decides some ops anew and the others stay where they are.

        Args:
            problem: What to place.
            assignment: int32[N] device indices to start from.
            free: bool[N], the ops that the policy decides; with one of them, all that are co-located with it. It
                decides the others too where the mask forbids their device.
            count: Placements to draw.
            seed: Of the draws.
            temperature: Of the softmax over the devices' scores; 0 = greedy.
            tables: The problem's tables, where they are known already.

        Returns:
            int32[P, N] device indices, P <= count: draws that ended without an allowed device are left out.

        Raises:
            InputError: If the assignment or `free` has another length, or a device is not there.
        """
        tables = build_tables(problem) if tables is None else tables
        if np.shape(free) != (problem.num_ops,):
            raise InputError(f"free has shape {np.shape(free)}; pass one flag for each of the {problem.num_ops} ops")
        forced = _actions(problem, tables, assignment)
        forced[tables.class_of[np.asarray(free, bool)]] = -1
        return roll(
            tables,
            self._weights,
            count=count,
            temperature=temperature,
            seed=seed,
            forced=forced,
            masks=self.config.masks,
        )


def _actions(problem: Problem, tables: Tables, assignment: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the device of every class, int32[C], in a checked assignment."""
    placed = np.asarray(assignment)
    if placed.shape != (problem.num_ops,):
        raise InputError(f"the assignment has shape {placed.shape}; pass one device for each of {problem.num_ops} ops")
    if placed.size and not (placed.min() >= 0 and placed.max() < problem.num_devices):
        raise InputError(f"the assignment names devices outside 0 to {problem.num_devices - 1}; use those indices")
    return placed[tables.class_members[tables.class_offsets[:-1]]].astype(np.int32)
