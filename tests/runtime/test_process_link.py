import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.runtime.processes import ProcessReplicas

A, B = "host0/cpu:0", "host0/cpu:1"


def test_a_killed_process_gives_a_sentence_and_leaves_nothing(cluster, make_plan):
    model = nn.Linear(3, 2)
    executor = ProcessReplicas(model, make_plan(A, B, engine="processes"), cluster)
    output = executor(torch.ones(4, 3))
    popen = executor._processes[0].popen
    os.kill(popen.pid, signal.SIGKILL)
    with pytest.raises(ExecutionError, match="ended; build the executor again"):
        output.sum().backward()
    assert popen.returncode is not None, "it was waited for"
    with pytest.raises(ExecutionError, match="closed"):
        executor(torch.ones(4, 3))
    executor.close()
    assert model(torch.ones(4, 3)).shape == (4, 2)


def test_a_process_that_hangs_is_given_up(cluster, make_plan, monkeypatch):
    monkeypatch.setattr(ProcessReplicas, "answer_limit_s", 0.3)
    executor = ProcessReplicas(nn.Linear(3, 2), make_plan(A, B, engine="processes"), cluster)
    popen = executor._processes[0].popen
    os.kill(popen.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(ExecutionError, match="no answer"):
        executor(torch.ones(4, 3))
    assert time.monotonic() - start < 30 and popen.returncode is not None


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    from torch import nn
    from autoplace.hardware.cluster import Cluster, Device
    from autoplace.plan import Plan, Replica
    from autoplace.runtime import DeviceWorker, build_executor

    assert __name__ == "__main__", "the main file was run again"
    print("main", flush=True)
    cores = sorted(os.sched_getaffinity(0))
    cluster = Cluster(devices=(Device(name="h/cpu:0", kind="cpu", cores=(cores[0],)),
                               Device(name="h/cpu:1", kind="cpu", cores=(cores[-1],))))
    plan = Plan(replicas=tuple(Replica(assignment={".": d.name}, share=0.5) for d in cluster.devices),
                strategy="t", engine="processes")
    executor = build_executor(nn.Linear(2, 2), plan, cluster)
    executor(torch.ones(2, 2))
    print(executor._processes[0].popen.pid, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    """
)


def _gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_processes_end_with_their_caller(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    runs = [
        subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, text=True)
        for how in ("kill", "return")
    ]
    for run, code in zip(runs, (-signal.SIGKILL, 0), strict=True):
        out, _ = run.communicate(timeout=120)
        first, pid = out.split()
        assert first == "main" and run.returncode == code
        assert _gone(int(pid))
