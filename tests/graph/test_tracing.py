"""A model is captured in one thread while others run it, or another, as if nothing were."""

import threading
import time

import pytest
import torch

from autoplace.graph.capture import capture
from autoplace.graph.export_flat import export_flat
from autoplace.graph.tracing import modules_to_trace
from autoplace.workload import Workload


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
        self.calls = 0

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
            time.sleep(0.001)  # lets the other thread into the middle of a trace, and of a call
        return x


class _Traffic:
    """Calls a model again and again from a thread of its own while the body runs; keeps the first wrong answer."""

    def __init__(self, model, *, train=False):
        self._model, self._train = model, train
        self._x = torch.randn(4, 8)
        self._expected = self._step()
        self.served, self.wrong = 0, None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _step(self):
        if not self._train:
            with torch.no_grad():
                return [self._model(self._x)]
        output = self._model(self._x)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), list(self._model.parameters()))]

    def _serve(self):
        try:
            while not self._stop.is_set():
                got = self._step()
                assert all(type(t) is torch.Tensor for t in got)
                torch.testing.assert_close(got, self._expected, rtol=0, atol=0)
                self.served += 1
        except BaseException as error:
            self.wrong = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()
        if self.wrong is not None:
            raise self.wrong


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("same", [True, False], ids=["same model", "another model"])
def test_a_model_serves_while_it_is_captured(same, train):
    model = Net()
    served = model if same else Net()
    workload = Workload(model=model, args=(torch.randn(4, 8),), training=train)
    alone = capture(workload)
    with _Traffic(served, train=train) as traffic:
        for _ in range(3):
            captured = capture(workload)
            assert captured.rung == "export"
            assert captured.graph.names == alone.graph.names
    assert traffic.served > 3


def test_a_model_serves_while_its_program_is_made():
    model = Net()
    with _Traffic(model) as traffic:
        for _ in range(3):
            with modules_to_trace(model) as copied, torch.no_grad():
                program = export_flat(_Flat(copied), [torch.randn(4, 8)], batch=4)
            assert sum(node.op == "call_function" for node in program.graph.nodes) == 12
    assert traffic.served > 3


class _Flat(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return (self.model(*tensors),)


def test_a_model_is_compiled_while_another_is_captured():
    model, other = Net(), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
    x, errors = torch.randn(4, 8), []
    workload = Workload(model=model, args=(torch.randn(4, 8),))
    call, getattribute = torch.nn.Module.__call__, torch.nn.Module.__getattr__

    def compile_often():
        try:
            for _ in range(4):
                torch._dynamo.reset_code(type(other).forward.__code__)
                compiled = torch.compile(other, backend="aot_eager")
                torch.testing.assert_close(compiled(x), other(x))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=compile_often)
    thread.start()
    while thread.is_alive():
        assert capture(workload).rung == "export"
    thread.join()
    assert not errors
    assert torch.nn.Module.__call__ is call and torch.nn.Module.__getattr__ is getattribute


class Uncopyable(Net):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


def test_a_model_that_cannot_be_copied_is_traced_itself_and_put_back():
    model = Uncopyable()
    with modules_to_trace(model) as traced:
        assert traced is model
        traced.calls = 5
    assert model.calls == 0
    assert capture(Workload(model=model, args=(torch.randn(4, 8),))).rung == "export"


def test_a_copy_shares_parameters_and_buffers_alone():
    model = torch.nn.Sequential(Net(), torch.nn.BatchNorm1d(8))
    with modules_to_trace(model) as traced:
        assert traced is not model and traced[0].layers is not model[0].layers
        for mine, theirs in zip(traced.parameters(), model.parameters(), strict=True):
            assert mine is theirs
        for mine, theirs in zip(traced.buffers(), model.buffers(), strict=True):
            assert mine is theirs
