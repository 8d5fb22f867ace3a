"""`play`: when every rank of a pipeline runs what, under the schedules of `torch.distributed.pipelining`.

Every rank follows a fixed programme of posts, waits and runs, which is that of torch's schedule:

- `gpipe`: all forwards, then all backwards, microbatch by microbatch. A receive is posted when its value is needed;
  sends are waited for at the end of the forwards and of the backwards. → `_gpipe`
- `1f1b`: stage s of S runs min(m, S - s) forwards, then one backward and one forward in turn, then the backwards that
  are left. Sends and receives of neighbours are posted and awaited together. → `_one_forward_one_backward`
- `looped`: several stages a rank. All forwards of a stage, stage after stage, then the backwards in reverse; receives
  are posted beforehand, sends are never waited for. → `_looped`

A transfer begins when both its ends have posted it and the one before it on its directed link is over: gloo moves
nothing before the receiver asks. The processor that sends pays for the copy besides.

It does not know other replicas, whose transfers may share a network card, nor NCCL, which moves what a receiver has not
asked for yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Action", "Played", "StageTimes", "Transfer", "most_in_flight", "play", "schedule_of"]

Key = tuple[bool, int, int]
"""A transfer: whether it goes backwards, the stage before the border, the microbatch."""


class _Run(NamedTuple):
    backward: bool
    stage: int
    microbatch: int


class _Post(NamedTuple):
    sends: tuple[Key, ...] = ()
    receives: tuple[Key, ...] = ()


class _Wait(NamedTuple):
    keys: tuple[Key, ...]


Instruction = _Run | _Post | _Wait


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """What the S stages of a replica take for one microbatch, ms."""

    devices: tuple[int, ...]
    """Device of every stage."""
    forward_ms: Sequence[float]
    """S times."""
    backward_ms: Sequence[float] | None = None
    """S times; None for inference."""
    onward_ms: Sequence[float] = ()
    """S - 1 times of a transfer from each stage to the next."""
    back_ms: Sequence[float] = ()
    """S - 1 times of a transfer of gradients the other way."""
    copies_ms: Sequence[tuple[float, float]] = ()
    """S - 1 pairs: what a transfer onward and one back cost their senders' processors."""


class Action(NamedTuple):
    """One run of a stage."""

    device: int
    stage: int
    microbatch: int
    backward: bool
    start_ms: float
    end_ms: float


class Transfer(NamedTuple):
    """One transfer over a border."""

    source: int
    target: int
    microbatch: int
    backward: bool
    start_ms: float
    end_ms: float


@dataclass(kw_only=True)
class Played:
    """What a schedule comes to; by device."""

    end_ms: dict[int, float]
    """When the rank has run and sent all."""
    busy_ms: dict[int, float]
    """Its runs and its copies."""
    actions: list[Action] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def makespan_ms(self) -> float:
        """When the last rank is done, ms."""
        return max(self.end_ms.values())


def schedule_of(devices: Sequence[int], microbatches: int, *, backward: bool, gpipe: bool = False) -> str:
    """Return which schedule the runtime takes: `gpipe`, `1f1b` or `looped`.

    Args:
        devices: Of every stage.
        microbatches: That are run.
        backward: Whether there is one.
        gpipe: Whether GPipe is wanted where 1F1B could run as well.
    """
    if len(set(devices)) < len(devices):
        return "looped"
    return "1f1b" if backward and not gpipe and microbatches >= len(devices) > 1 else "gpipe"


def most_in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Return how many microbatches' activations a stage holds at most."""
    return min(microbatches, stages - stage) if schedule == "1f1b" else microbatches


def play(times: StageTimes, microbatches: int, schedule: str) -> Played:
    """Return when everything runs.

    Args:
        times: Of one microbatch.
        microbatches: 1 or more.
        schedule: See the module.
    """
    return _Player(times, _programmes(schedule, times.devices, microbatches, times.backward_ms is not None)).run()


@lru_cache(maxsize=1024)
def _programmes(
    schedule: str, devices: tuple[int, ...], microbatches: int, backward: bool
) -> dict[int, list[Instruction]]:
    """Return every rank's programme; it is only read."""
    if schedule == "1f1b":
        return _one_forward_one_backward(devices, microbatches, backward)
    return (_looped if schedule == "looped" else _gpipe)(devices, microbatches, backward)


class _Player:
    """Advances every rank as far as it can, in turn, until all are done."""

    def __init__(self, times: StageTimes, programmes: dict[int, list[Instruction]]) -> None:
        self._times, self._programmes = times, programmes
        self._clock = dict.fromkeys(programmes, 0.0)
        self._sent: dict[Key, float] = {}
        self._asked: dict[Key, float] = {}
        self._ends: dict[Key, float] = {}
        self._free: dict[tuple[int, int], float] = {}
        self._played = Played(end_ms=self._clock, busy_ms=dict.fromkeys(programmes, 0.0))

    def run(self) -> Played:
        next_of = dict.fromkeys(self._programmes, 0)
        moved = True
        while moved:
            moved = False
            for device, programme in self._programmes.items():
                while next_of[device] < len(programme) and self._step(device, programme[next_of[device]]):
                    next_of[device] += 1
                    moved = True
        assert all(next_of[d] == len(p) for d, p in self._programmes.items()), "the schedule waits for itself"
        return self._played

    def _step(self, device: int, instruction: Instruction) -> bool:
        """Carry out one instruction; whether the rank could."""
        if isinstance(instruction, _Run):
            self._compute(device, instruction)
        elif isinstance(instruction, _Post):
            for key in instruction.sends:
                copy_ms = self._times.copies_ms[key[1]][key[0]] if self._times.copies_ms else 0.0
                self._clock[device] += copy_ms
                self._played.busy_ms[device] += copy_ms
                self._sent[key] = self._clock[device]
                self._carry(key)
            for key in instruction.receives:
                self._asked[key] = self._clock[device]
                self._carry(key)
        else:
            if any(key not in self._ends for key in instruction.keys):
                return False
            self._clock[device] = max([self._clock[device], *(self._ends[key] for key in instruction.keys)])
        return True

    def _compute(self, device: int, run: _Run) -> None:
        took = self._times.forward_ms if not run.backward else self._times.backward_ms
        assert took is not None  # a backward is in no programme of inference
        start = self._clock[device]
        self._clock[device] = start + took[run.stage]
        self._played.busy_ms[device] += took[run.stage]
        self._played.actions.append(Action(device, run.stage, run.microbatch, run.backward, start, self._clock[device]))

    def _carry(self, key: Key) -> None:
        """Put a transfer on its link once both ends have posted it."""
        if key not in self._sent or key not in self._asked:
            return
        backward, border, microbatch = key
        source, target = self._times.devices[border], self._times.devices[border + 1]
        if backward:
            source, target = target, source
        start = max(self._sent[key], self._asked[key], self._free.get((source, target), 0.0))
        end = start + (self._times.back_ms if backward else self._times.onward_ms)[border]
        self._ends[key] = self._free[source, target] = end
        self._played.transfers.append(Transfer(source, target, microbatch, backward, start, end))


def _onward(stage: int, stages: int, microbatch: int) -> tuple[Key, ...]:
    """The transfer of a stage's results; none after the last."""
    return ((False, stage, microbatch),) if 0 <= stage < stages - 1 else ()


def _back(stage: int, microbatch: int) -> tuple[Key, ...]:
    """The transfer of the gradients of what a stage took; none before the first."""
    return ((True, stage - 1, microbatch),) if stage > 0 else ()


def _gpipe(devices: Sequence[int], microbatches: int, backward: bool) -> dict[int, list[Instruction]]:
    programmes = {}
    for stage, device in enumerate(devices):
        programme: list[Instruction] = []
        sent: tuple[Key, ...] = ()
        for k in range(microbatches):
            taken, given = _onward(stage - 1, len(devices), k), _onward(stage, len(devices), k)
            programme += [_Post(receives=taken), _Wait(taken), _Run(False, stage, k), _Post(sends=given)]
            sent += given
        programme.append(_Wait(sent))
        sent = ()
        for k in range(microbatches if backward else 0):
            taken, given = _back(stage + 1, k) if stage < len(devices) - 1 else (), _back(stage, k)
            programme += [_Post(receives=taken), _Wait(taken), _Run(True, stage, k), _Post(sends=given)]
            sent += given
        programme.append(_Wait(sent))
        programmes[device] = programme
    return programmes


def _one_forward_one_backward(
    devices: Sequence[int], microbatches: int, backward: bool
) -> dict[int, list[Instruction]]:
    assert backward and microbatches >= len(devices)  # see `schedule_of`
    return {device: _in_turn(stage, len(devices), microbatches) for stage, device in enumerate(devices)}


def _in_turn(stage: int, stages: int, microbatches: int) -> list[Instruction]:
    programme: list[Instruction] = []
    warm_up = min(microbatches, stages - stage)
    sent: tuple[Key, ...] = ()
    for k in range(warm_up):
        taken = _onward(stage - 1, stages, k)
        programme += [_Post(receives=taken), _Wait(taken), _Run(False, stage, k), _Wait(sent)]
        sent = _onward(stage, stages, k)
        if k < warm_up - 1:
            programme.append(_Post(sends=sent))
    waiting = sent
    for k in range(microbatches):
        taken = _back(stage + 1, k) if stage < stages - 1 else ()
        following = k + warm_up
        if following <= microbatches:  # the last forward's send goes with the first backward that follows it
            programme += [_Post(sends=waiting, receives=taken), _Wait(waiting + taken), _Run(True, stage, k)]
        else:
            programme += [_Post(receives=taken), _Wait(taken), _Run(True, stage, k), _Wait(sent)]
        sent = _back(stage, k)
        if following < microbatches:
            taken = _onward(stage - 1, stages, following)
            programme += [_Post(sends=sent, receives=taken), _Wait(sent + taken), _Run(False, stage, following)]
            waiting = _onward(stage, stages, following)
        else:
            programme.append(_Post(sends=sent))
    programme.append(_Wait(sent))
    return programme


def _looped(devices: Sequence[int], microbatches: int, backward: bool) -> dict[int, list[Instruction]]:
    stages = len(devices)
    programmes: dict[int, list[Instruction]] = {device: [] for device in devices}
    asked: dict[int, tuple[Key, ...]] = dict.fromkeys(devices, ())
    order = [(False, stage) for stage in range(stages)]
    order += [(True, stage) for stage in reversed(range(stages))] if backward else []
    for back, stage in order:
        for k in range(microbatches):
            if back:
                taken, given = _back(stage + 1, k) if stage < stages - 1 else (), _back(stage, k)
            else:
                taken, given = _onward(stage - 1, stages, k), _onward(stage, stages, k)
            programmes[devices[stage]] += [_Wait(taken), _Run(back, stage, k), _Post(sends=given)]
            asked[devices[stage]] += taken
    return {device: [_Post(receives=asked[device]), *programme] for device, programme in programmes.items()}
