"""Whether the present thread is traced, not some other one."""

from concurrent.futures import ThreadPoolExecutor

import torch

from autoplace.graph.capture import capture
from autoplace.tracer import compiling_here, tracing_here
from autoplace.workload import Workload


def _elsewhere(ask):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def test_while_autoplace_traces_only_its_own_thread_is_traced(monkeypatch):
    assert not compiling_here()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert compiling_here() and _elsewhere(compiling_here), "by somebody else, anywhere"
    with tracing_here():
        assert compiling_here() and not _elsewhere(compiling_here)
        with tracing_here():
            pass
        assert not _elsewhere(compiling_here)
    assert _elsewhere(compiling_here)


def test_a_capture_says_where_it_traces():
    answers = set()

    class Net(torch.nn.Module):
        def forward(self, x):
            if torch.compiler.is_compiling():
                answers.add((compiling_here(), _elsewhere(compiling_here), _elsewhere(torch.compiler.is_compiling)))
            return x + 1

    assert capture(Workload(model=Net(), args=(torch.ones(2, 2),))).rung == "export"
    assert answers == {(True, False, True)}


def test_dynamo_sees_that_it_compiles():
    seen = torch.compile(lambda x: x + 1 if compiling_here() else x - 1, backend="eager", fullgraph=True)
    assert seen(torch.zeros(1)).item() == 1.0
