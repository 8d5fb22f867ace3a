"""`torch.compile` for executors: the one place where a stage, or the whole model, is compiled.

A `Compiler` belongs to one executor and counts the seconds that its calls spent compiling. What is compiled belongs to
the module, by a weak reference, and is shared by all executors of the process: one built later for the same module
compiles nothing again.

1. Each module, and each of the first few signatures (shapes and types of its inputs), is compiled as a function of its
   own. TorchDynamo keeps and counts compiled code per code object, and forgets by its name which sizes were static:
   through the one `Module.__call__` the layers of a model would count against each other's limit of eight, and a second
   shape anywhere would turn the others' code into that for any shape. Signatures beyond the first few share one
   function for any shape.
2. A first call runs alone, under a lock: two threads that miss the same code would both compile it. It compiles the
   backward too, so that no worker compiles in the middle of a backward, and without donated buffers, which forbid
   `retain_graph=True`. Hooks of modules are guarded, so that one added later runs.
3. With `cpp_wrapper` the generated code is one C++ function that calls all kernels without holding Python's lock:
   callers in several threads run at once, and small kernels do not wait for Python.
4. Nothing falls back to eager silently: where TorchDynamo gives up, or compiles no part of a whole model, the call
   raises an ExecutionError. Single operations that it leaves to Python (graph breaks) are no reason.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

from autoplace.errors import ExecutionError

__all__ = ["Compiler"]

_MOST_STATIC = 4
"""Signatures of one module that get code of their own."""
_MOST_WARM = 1024
"""Signatures that are remembered as having run."""
_RECOMPILES = 64
"""Times that one signature may be compiled again: other strides, flags, or grad and autocast modes."""
_MOST_TRUSTED = 6
"""Times after which every call is made under `_settings`: at eight, PyTorch's own limit would silently go to eager."""
_FX_TRACE = "Detected that you are using FX to symbolically trace"
"""How TorchDynamo refuses a call while another thread traces a graph; nothing of the call has run by then."""

_first_calls = threading.RLock()
_numbers = itertools.count()


class _Local(threading.local):
    compiles = 0


_local = _Local()


def _inductor(
    graph: torch.fx.GraphModule, inputs: list[torch.Tensor], patches: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph as `torch.compile` does by default, patches apart, and count it for the thread that asked."""
    from torch._inductor.compile_fx import compile_fx

    _local.compiles += 1
    return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=patches))


def _inductor_cpp(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """Do the same with `cpp_wrapper` (see note 3)."""
    with _without_hints():
        return _inductor(graph, inputs, {"cpp_wrapper": True})


@contextmanager
def _without_hints() -> Iterator[None]:
    """Hold back a warning for each operator that C++ has to call in a slower way; whether it pays is measured."""
    logger = logging.getLogger("torch._inductor.ir")

    def matters(record: logging.LogRecord) -> bool:
        return "c-shim" not in record.getMessage()

    logger.addFilter(matters)
    try:
        yield
    finally:
        logger.removeFilter(matters)


@contextmanager
def _settings() -> Iterator[None]:
    """Hold TorchDynamo's settings for first calls (see notes 2 and 4); they are those of the calling thread alone."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    wanted: list[tuple[Any, dict[str, Any]]] = [
        (
            dynamo,
            {
                "recompile_limit": _RECOMPILES,
                "accumulated_recompile_limit": 4 * _RECOMPILES,
                "fail_on_recompile_limit_hit": True,
                "skip_nnmodule_hook_guards": False,
            },
        ),
        (functorch, {"donated_buffer": False, "force_non_lazy_backward_lowering": True}),
    ]
    with ExitStack() as stack:
        for config, values in wanted:
            stack.enter_context(config.patch({name: value for name, value in values.items() if hasattr(config, name)}))
        stack.enter_context(_no_donated_buffers())
        yield


@contextmanager
def _no_donated_buffers() -> Iterator[None]:
    """Have backward code know that it has no donated buffers; the caller holds TorchDynamo's lock.

    PyTorch's setting leaves their list at None, for which a backward that retains its graph refuses to run as if there
    were some, unless the setting still holds then (`_backward_impl` in runtime_wrappers.py, PyTorch 2.13).
    """
    from torch._functorch._aot_autograd.schemas import ViewAndMutationMeta

    original = ViewAndMutationMeta.__post_init__

    def post_init(self: Any) -> None:
        original(self)
        if self.bw_donated_idxs is None:
            self.bw_donated_idxs = []

    ViewAndMutationMeta.__post_init__ = post_init  # type: ignore[method-assign]
    try:
        yield
    finally:
        ViewAndMutationMeta.__post_init__ = original  # type: ignore[method-assign]


class Compiler:
    """Has the callables of one executor compiled.

    Args:
        cpp_wrapper: Whether C++ calls the kernels (see note 3).
    """

    def __init__(self, *, cpp_wrapper: bool = False) -> None:
        self._backend = _inductor_cpp if cpp_wrapper else _inductor
        self._lock = threading.Lock()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall seconds of the calls that compiled something, their own work included."""
        return self._seconds

    def wrap(
        self, module: torch.nn.Module, function: Callable[..., Any] | None = None, *, whole: bool = False
    ) -> Callable[..., Any]:
        """Return a callable that does what `function` does, compiled on its first call; nothing is compiled here.

        Args:
            module: Whose call it is; what is compiled for it is kept as long as it lives.
            function: The module itself (None), its `forward`, or any callable, which is then compiled for this
                executor alone.
            whole: Whether to raise when nothing at all of it can be compiled.
        """
        code, target = _code_of(module, function, self._backend)

        def call(*args: Any, **kwargs: Any) -> Any:
            return code.call(self, target, args, kwargs, whole)

        return call

    def add(self, seconds: float) -> None:
        """Count seconds of compiling."""
        with self._lock:
            self._seconds += seconds


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _call_method(
    method: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return method(module, *args, **kwargs)


def _fresh(
    template: Callable[..., Any], name: str, backend: Callable[..., Any], dynamic: bool | None
) -> Callable[..., Any]:
    """Return a compiled copy of a function, with a code object of its own name (see note 1)."""
    code = template.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    return torch.compile(types.FunctionType(code, template.__globals__), backend=backend, dynamic=dynamic)


class _Code:
    """What was compiled of one module: its call, or its `forward`. Holds no reference to the module.

    Args:
        template: `_call` or `_call_method`.
        name: What error messages and profiles call it.
        backend: Compiles the graphs of it.
    """

    def __init__(self, template: Callable[..., Any], name: str, backend: Callable[..., Any]) -> None:
        self._template, self._name, self._backend = template, name, backend
        self._static: dict[Any, Callable[..., Any]] = {}
        self._dynamic: Callable[..., Any] | None = None
        self._warm: dict[Any, Callable[..., Any]] = {}
        self._compiles: dict[Callable[..., Any], int] = {}

    def call(
        self, compiler: Compiler, target: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool
    ) -> Any:
        """Run one call; with a signature in a mode, calls run alone until one compiled nothing."""
        training = getattr(target[-1], "training", None)
        key = (torch.is_grad_enabled(), training, _signature(args), _signature(kwargs.values()), *kwargs)
        function = self._warm.get(key)
        if function is None:
            return self._first(compiler, key, target, args, kwargs, whole)
        before, start = _local.compiles, time.perf_counter()
        try:
            result = function(*target, args, kwargs)
        except Exception as error:
            if isinstance(error, RuntimeError) and str(error).startswith(_FX_TRACE):
                return self._first(compiler, key, target, args, kwargs, whole)
            _raise_clearly(error, self._name)
            raise
        if _local.compiles != before:  # a guard failed; the next such call is made under `_settings` again
            self._warm.pop(key, None)
            self._count(function, compiler, time.perf_counter() - start)
        return result

    def _count(self, function: Callable[..., Any], compiler: Compiler, seconds: float) -> None:
        compiler.add(seconds)
        self._compiles[function] = self._compiles.get(function, 0) + 1
        if self._compiles[function] >= _MOST_TRUSTED:
            for key in [key for key, other in list(self._warm.items()) if other is function]:
                self._warm.pop(key, None)

    def _first(
        self,
        compiler: Compiler,
        key: tuple[Any, ...],
        target: tuple[Any, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: bool,
    ) -> Any:
        from torch._dynamo.convert_frame import compile_lock

        with _first_calls, compile_lock, _settings():
            function = self._function(key[2:])
            before, start = _local.compiles, time.perf_counter()
            try:
                result = function(*target, args, kwargs)
            except Exception as error:
                _raise_clearly(error, self._name)
                raise
            if _local.compiles != before:
                self._count(function, compiler, time.perf_counter() - start)
            elif self._compiles.get(function, 0) < _MOST_TRUSTED:
                if len(self._warm) >= _MOST_WARM:
                    self._warm.clear()
                self._warm[key] = function
        if whole and not self._compiles:
            raise ExecutionError(
                f"torch.compile found nothing in {self._name} that it can compile; use a plan that is not compiled"
            )
        return result

    def _function(self, shapes: tuple[Any, ...]) -> Callable[..., Any]:
        if shapes not in self._static and len(self._static) >= _MOST_STATIC:
            if self._dynamic is None:
                self._dynamic = _fresh(self._template, self._name, self._backend, True)
            return self._dynamic
        if shapes not in self._static:
            self._static[shapes] = _fresh(self._template, self._name, self._backend, None)
        return self._static[shapes]


def _signature(values: Any) -> tuple[Any, ...]:
    """Return shapes and types of the tensors, and the types of all else; what is nested counts by its type."""
    return tuple([(v.shape, v.dtype) if isinstance(v, torch.Tensor) else type(v) for v in values])


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, Callable[..., Any]], _Code]] = (
    weakref.WeakKeyDictionary()
)
_known_lock = threading.Lock()


def _code_of(
    module: torch.nn.Module, function: Callable[..., Any] | None, backend: Callable[..., Any]
) -> tuple[_Code, tuple[Any, ...]]:
    """Return the code for a callable of a module, and the arguments that come before its inputs."""
    name = type(module).__name__
    kind, template = "call", cast(Callable[..., Any], _call)
    target: tuple[Any, ...] = (module,)
    if isinstance(function, types.MethodType) and function.__self__ is module:
        kind, template, target = f"method {id(function.__func__)}", _call_method, (function.__func__, module)
    elif function is not None and function is not module:
        return _Code(_call, name, backend), (function,)
    with _known_lock:
        codes = _known.setdefault(module, {})
        if (kind, backend) not in codes:
            codes[kind, backend] = _Code(template, name, backend)
        return codes[kind, backend], target


def _raise_clearly(error: Exception, name: str) -> None:
    """Raise an ExecutionError in place of an error of TorchDynamo; return where the error is the model's own."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InvalidCxxCompiler

    if isinstance(error, FailOnRecompileLimitHit):
        raise ExecutionError(
            f"torch.compile gave up on {name}: something in it changes from call to call, so that it was compiled "
            f"{_RECOMPILES} times for the same inputs; use a plan that is not compiled"
        ) from error
    if not isinstance(error, TorchDynamoException | InvalidCxxCompiler):
        return
    causes = (error, error.__cause__, getattr(error, "inner_exception", None))
    if any(isinstance(cause, InvalidCxxCompiler) for cause in causes):
        raise ExecutionError(
            "torch.compile needs a C++ compiler and finds none; install g++ or clang, or name one in the environment "
            "variable CXX, or use a plan that is not compiled"
        ) from error
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise ExecutionError(
        f"torch.compile gave up on {name}: {first.rstrip('.')}; use a plan that is not compiled"
    ) from error
