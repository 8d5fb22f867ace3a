"""The other end of `processes`: a process that holds a copy of the model and answers passes, forward and backward.

It is a fresh interpreter that imports what the model's pickle needs and never the caller's main file. It ends when the
connection closes, whatever it is doing, so that no worker outlives its caller.

1. A forward with gradients leaves its graph here under the pass's number, until the backward or a word that the
   caller's end was dropped.
2. The microbatches of a replica are run one after the other and merged in the graph itself → `run_parts`.
3. Inputs are copied out of the shared slab before the model sees them: models may keep them.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .batch import CAT, MEAN, join_kinds
from .channel import Channel
from .compiling import Compiler
from .layout import lay_out, take_back
from .mirror import Changes, apply_changes
from .segments import alias
from .shipping import Shipment, dump, load, receive_model
from .sites import autocast_dtype
from .slab import Packed, Slab
from .tree import Tree

__all__ = [
    "Answer",
    "Backward",
    "Failure",
    "Forward",
    "Modes",
    "Runner",
    "Start",
    "intra_op_threads",
    "run_parts",
    "serve",
]

_LOOK_MS = 5000
"""How often a worker looks whether its caller still lives, should the connection not tell."""


class Modes(NamedTuple):
    """What of a thread's state a model's pass depends on."""

    grad: bool
    inference: bool
    autocasts: tuple[tuple[str, torch.dtype], ...]
    autocast_cache: bool
    dtype: torch.dtype
    """The default type of new tensors."""
    matmul_precision: str
    deterministic: bool

    @staticmethod
    def of_caller() -> Modes:
        """Return the calling thread's."""
        autocasts = (("cpu", torch.get_autocast_dtype("cpu")),) if torch.is_autocast_enabled("cpu") else ()
        return Modes(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            autocasts,
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into these modes; what belongs to the whole process stays so."""
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        if torch.get_float32_matmul_precision() != self.matmul_precision:
            torch.set_float32_matmul_precision(self.matmul_precision)
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:
            torch.use_deterministic_algorithms(self.deterministic)
        with ExitStack() as stack:
            if self.inference:
                stack.enter_context(torch.inference_mode())
            for kind, dtype in self.autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.autocast_cache))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            yield


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first message: what to run and how."""

    shipment: Shipment
    inputs_fd: int
    outputs_fd: int
    threads: int
    seed: int
    precision: str
    compiled: bool
    cpp_wrapper: bool
    channels_last: bool


class Forward(NamedTuple):
    """Run a pass; the tensors lie in the inputs' slab, the buffers' new values first."""

    number: int
    """Its own number, given by the connection, as is `dropped`."""
    dropped: list[int]
    """Numbers of passes whose graphs nobody will ask for any more."""
    changes: Changes
    seed: int | None
    """For the random numbers of this pass; None goes on with those of the last."""
    modes: Modes
    structure: bytes
    """The pickled (args, kwargs) → `shipping`."""
    tensors: list[Packed | None]
    split: list[bool]
    """Per input tensor, whether it is split into microbatches."""
    requires_grad: list[bool]
    """Per input tensor."""
    sizes: list[int]
    """Samples of every microbatch."""


class Backward(NamedTuple):
    """Run the backward of an earlier pass; the outputs' gradients lie in the inputs' slab."""

    number: int
    dropped: list[int]
    of: int
    """Number of the pass."""
    keep: bool
    outputs: list[int]
    """Which of the pass's output tensors have a gradient."""
    tensors: list[Packed | None]


class Answer(NamedTuple):
    """What came of a message; the tensors lie in the outputs' slab."""

    number: int
    tensors: list[Packed | None]
    """The outputs, or the gradients of input tensors and parameters that require one."""
    span: tuple[float, float]
    """Start and end by `time.perf_counter`, s, which all processes of a host share."""
    structure: bytes = b""
    requires_grad: tuple[bool, ...] = ()
    """Per output tensor."""
    random: bool = False
    """Whether random numbers were drawn."""
    modified: bool = False
    """Whether the model modified an input in place."""
    compile_s: float = 0.0
    """Seconds that the process has spent in `torch.compile` so far."""


class Failure(NamedTuple):
    """An exception instead of an answer."""

    number: int
    pickled: bytes
    """The exception; empty when it does not pickle."""
    summary: str
    text: str
    """Its traceback."""


class _Graph(NamedTuple):
    outputs: list[torch.Tensor]
    targets: list[torch.Tensor | None]


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Run the calling thread's operations on this many threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Runner:
    """A model as a plan's knobs want it called.

    Args:
        model: The model.
        precision: A key of `sites.PRECISIONS`.
        compiled: Whether it goes through `torch.compile`.
        cpp_wrapper: Whether C++ calls the kernels then.
        channels_last: Whether image inputs are laid out channels last.
    """

    def __init__(
        self, model: torch.nn.Module, *, precision: str, compiled: bool, cpp_wrapper: bool, channels_last: bool
    ) -> None:
        self._compiler = Compiler(cpp_wrapper=cpp_wrapper)
        self._function: Callable[..., Any] = self._compiler.wrap(model, whole=True) if compiled else model
        self._dtype = autocast_dtype(precision)
        self._channels_last = channels_last

    @property
    def compile_s(self) -> float:
        """Wall seconds spent in `torch.compile`."""
        return self._compiler.seconds

    def run(
        self,
        build: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any]]],
        values: list[Any],
        split: Sequence[bool],
        sizes: Sequence[int],
    ) -> Tree:
        """Run one replica's share of a batch.

        Args:
            build: Leaves to (args, kwargs).
            values: The leaves, for the whole share; the list may be changed.
            split: Per leaf, whether the microbatches get slices of it.
            sizes: Samples of every microbatch.

        Returns:
            The output, taken apart; with gradients on, the microbatches are merged in the graph.
        """
        laid = lay_out(values) if self._channels_last else []
        with torch.autocast("cpu", dtype=self._dtype) if self._dtype is not None else nullcontext():
            output = run_parts(self._function, build, values, split, sizes)
        take_back(laid, output.leaves)
        return output


def run_parts(
    function: Callable[..., Any],
    build: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any]]],
    values: Sequence[Any],
    split: Sequence[bool],
    sizes: Sequence[int],
) -> Tree:
    """Run a function on the microbatches of its inputs, one after the other; arguments as those of `Runner.run`."""
    parts: list[Tree] = []
    start = 0
    for size in sizes:
        part = [
            value.narrow(0, start, size) if cut and len(sizes) > 1 else value
            for value, cut in zip(values, split, strict=True)
        ]
        args, kwargs = build(part)
        parts.append(Tree(function(*args, **kwargs), objects=True, keep=part))
        start += size
    if len(parts) == 1:
        return parts[0]
    merged = parts[0]
    kinds = join_kinds(parts, sizes)
    columns = list(zip(*(part.leaves for part in parts), strict=True))
    merged.leaves = [_merge(kind, column, sizes) for kind, column in zip(kinds, columns, strict=True)]
    return merged


def _merge(kind: str, column: Sequence[Any], sizes: Sequence[int]) -> Any:
    if kind == CAT:
        return torch.cat(list(column))
    if kind == MEAN:
        return sum(value * (size / sum(sizes)) for value, size in zip(column, sizes, strict=True))
    return column[0]


class _Worker:
    """Answers the messages of one caller."""

    def __init__(self, start: Start) -> None:
        torch.set_num_threads(start.threads)
        torch.manual_seed(start.seed)
        self._inputs, self._outputs = Slab(start.inputs_fd), Slab(start.outputs_fd)
        self._model = receive_model(start.shipment)
        self._runner = Runner(
            self._model,
            precision=start.precision,
            compiled=start.compiled,
            cpp_wrapper=start.cpp_wrapper,
            channels_last=start.channels_last,
        )
        self._parameters = list(self._model.parameters())
        self._graphs: dict[int, _Graph] = {}

    def answer(self, message: Forward | Backward) -> Answer | Failure:
        for number in message.dropped:
            self._graphs.pop(number, None)
        try:
            return self._forward(message) if isinstance(message, Forward) else self._backward(message)
        except Exception as error:  # it belongs to the caller
            return _failure(message.number, error)

    def _forward(self, ask: Forward) -> Answer:
        start_s = time.perf_counter()
        values = [self._inputs.look(place).clone() for place in ask.tensors if place is not None]
        count = len(ask.changes.buffers)
        apply_changes(self._model, ask.changes, values[:count])
        if ask.seed is not None:
            torch.default_generator.manual_seed(ask.seed)
        random = torch.default_generator.get_state()
        leaves: list[torch.Tensor | None] = []
        seen: list[torch.Tensor] = []
        for value, requires in zip(values[count:], ask.requires_grad, strict=True):
            leaf, own = alias(value.requires_grad_()) if ask.modes.grad and requires else (None, value)
            leaves.append(leaf)
            seen.append(own)
        with ask.modes.entered():
            output = self._runner.run(lambda tensors: load(ask.structure, tensors), seen, ask.split, ask.sizes)
        structure, outputs = dump(output.build(output.leaves), what="an output")
        grads = tuple(tensor.requires_grad for tensor in outputs)
        if any(grads):
            targets = [*leaves, *(p for p in self._parameters if p.requires_grad)]
            self._graphs[ask.number] = _Graph(outputs, targets)
        return Answer(
            ask.number,
            self._outputs.pack(outputs),
            (start_s, time.perf_counter()),
            structure,
            grads,
            random=not torch.equal(random, torch.default_generator.get_state()),
            modified=any(tensor._version for tensor in seen),
            compile_s=self._runner.compile_s,
        )

    def _backward(self, ask: Backward) -> Answer:
        start_s = time.perf_counter()
        graph = self._graphs[ask.of] if ask.keep else self._graphs.pop(ask.of)
        given = [self._inputs.look(place) for place in ask.tensors if place is not None]
        targets = [target for target in graph.targets if target is not None]
        found = iter(
            torch.autograd.grad(
                [graph.outputs[i] for i in ask.outputs], targets, given, retain_graph=ask.keep, allow_unused=True
            )
            if targets
            else ()
        )
        grads = [None if target is None else next(found) for target in graph.targets]
        return Answer(ask.number, self._outputs.pack(grads), (start_s, time.perf_counter()))


def _failure(number: int, error: Exception) -> Failure:
    text = "".join(traceback.format_exception(error))
    try:
        pickled = pickle.dumps(error.with_traceback(None))
        pickle.loads(pickled)  # some exceptions pickle and cannot be made again
    except Exception:
        pickled = b""
    return Failure(number, pickled, f"{type(error).__name__}: {error}", text)


def _end_with(end: socket.socket, parent: int) -> None:
    """End the process, whatever it is doing, once the connection or the caller is gone."""
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    while not poll.poll(_LOOK_MS) and os.getppid() == parent:
        pass
    os._exit(0)


def serve(fd: int, parent: int) -> None:
    """Answer messages until the connection closes; does not return.

    Args:
        fd: Descriptor of a connected stream socket; the first message on it is a `Start`.
        parent: Process id of the caller.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    end = socket.socket(fileno=fd)
    threading.Thread(target=_end_with, args=(end, parent), daemon=True).start()
    channel = Channel(end)
    try:
        try:
            worker = _Worker(pickle.loads(channel.receive()))
        except Exception as error:
            channel.send(pickle.dumps(_failure(0, error)))
            return
        channel.send(pickle.dumps(Answer(0, [], (0.0, 0.0))))
        while True:
            sys.stdout.flush()
            channel.send(pickle.dumps(worker.answer(pickle.loads(channel.receive())), pickle.HIGHEST_PROTOCOL))
    except (EOFError, OSError):
        return
    finally:
        os._exit(0)
