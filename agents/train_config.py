"""`TrainConfig`: what a training is told. Its defaults are the recipe of the policy that ships."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autoplace.errors import InputError

from .ppo import PpoConfig

__all__ = ["PARTS", "STAGES", "TrainConfig"]

STAGES = ("imitate", "simulate", "measure")
"""The stages, in order."""
PARTS = ("imitation", "message-passing", "masks")
"""What an ablation can leave out: the stage imitate, the columns propagated over the graph, the hard masks."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, and for how long."""

    output: Path
    """Folder for `policy/`, `checkpoints/` and `measured.jsonl`."""
    stages: tuple[str, ...] = ("imitate", "simulate")
    """Which of `STAGES` to run; they run in that order."""
    seed: int = 0
    problems: int = 800
    """Training problems that are drawn."""
    captured: float = 0.3
    """Share of them whose graph is captured from a `transformers` model; 0 where that is not installed."""
    max_ops: int = 300
    """Largest number of ops of those, about; most are much smaller."""
    max_devices: int = 16
    """Largest number of devices of any problem in training; the policy itself has no limit."""
    teacher_evaluations: int = 20_000
    """Simulations that the teacher may spend on each problem."""
    workers: int = 2
    """Processes that search for teachers; their number changes nothing but the time."""
    imitate_epochs: int = 30
    imitate_learning_rate: float = 2e-3
    """At the start; falls to a tenth by a half cosine."""
    simulate_steps: int = 5_000_000
    """Decisions of the simulated stage, rounded up to whole chunks."""
    measure_plans: int = 100
    """Real plans of the measured stage, rounded up to whole updates."""
    validation: int = 96
    """Training-family problems that choose among checkpoints."""
    held_out: int = 96
    """Held-out problems of the final evaluation."""
    hidden: int = 32
    """Width of the network."""
    without: tuple[str, ...] = ()
    """Which of `PARTS` to leave out, for ablations."""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    start: Path | None = None
    """Policy directory to start from; None = fresh weights."""
    resume: bool = False
    """Whether to go on from the last checkpoint in the output folder."""
    command: str = ""
    """What the person typed, for the card."""

    def __post_init__(self) -> None:
        if unknown := [s for s in self.stages if s not in STAGES]:
            raise InputError(f"stage {unknown[0]!r} is unknown; use {', '.join(STAGES)}")
        if unknown := [s for s in self.without if s not in PARTS]:
            raise InputError(f"there is no part {unknown[0]!r} to leave out; use {', '.join(PARTS)}")
        if not self.ordered_stages:
            raise InputError(f"no stage to train; use one or more of {', '.join(STAGES)}, and do not leave it out")
        if self.start is not None and set(self.without) - {"imitation"}:
            raise InputError("a policy to start from already has all its parts; leave them out of fresh weights alone")
        if not 0.0 <= self.captured <= 1.0:
            raise InputError(f"captured is {self.captured}; use a share from 0 to 1")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; use 1 or more")

    @property
    def ordered_stages(self) -> tuple[str, ...]:
        """The stages to run, in their order, without what is left out."""
        left_out = {"imitate"} if "imitation" in self.without else set()
        return tuple(s for s in STAGES if s in self.stages and s not in left_out)


_COUNTS = (
    "problems",
    "max_ops",
    "teacher_evaluations",
    "workers",
    "imitate_epochs",
    "simulate_steps",
    "measure_plans",
    "validation",
    "held_out",
)
