"""A training step that no host's memory has room for is tuned on two of them, with nothing killed for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
if not SCRIPTS.exists():
    pytest.skip("needs the repository's scripts", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

from testbed import BedHost, BedLink, TestBed, find_controller  # noqa: E402

COMMON = """
import json, os, sys
import torch
from torch import nn
from autoplace.group_tuner import tune_group
from autoplace.measure.memory import PeakMemory, process_bytes
from autoplace.runtime.distributed import Session
from autoplace.runtime.distributed.runner import DistributedModel

torch.set_num_threads(1)
torch.manual_seed(0)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.line(x))

def loss(output, targets):
    return (output - targets).square().mean()

model = nn.Sequential(*(Layer() for _ in range(6)))
batch, targets = torch.randn(16, 24576, 16), torch.zeros(16, 24576, 16)
"""
PLAIN = (
    COMMON
    + """
loss(model(batch[:1]), targets[:1]).backward()
resting, peak = process_bytes(), PeakMemory()
peak.begin(trim=True)
loss(model(batch), targets).backward()
peak.end()
print(resting, peak.host_bytes)
"""
)
TUNE = (
    COMMON
    + """
session = Session.join()
result = tune_group(model, batch, session, targets=targets, loss=loss, policy=None, budget_s=1.0, max_groups=6)
trained = DistributedModel(model, result.plan, session, loss=loss)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(2):
    optimizer.zero_grad()
    losses.append(float(trained.train_step(batch, targets)))
    optimizer.step()
told = {
    "shape": result.plan.shape,
    "microbatches": result.plan.microbatches,
    "losses": losses,
    "resting": dict(result.problem.resting_bytes),
    "feasible": [r.measured.feasible for r in result.rows if r.measured is not None],
}
trained.close()
session.close()
print("RESULT", json.dumps(told), flush=True)
"""
)
PART = 0.75
"""Of what a step of the whole batch adds, that the hosts have."""


@pytest.mark.testbed
@pytest.mark.slow
def test_a_step_that_no_host_can_hold_is_tuned_over_two(tmp_path):
    if missing := TestBed.missing():
        pytest.skip(missing)
    if find_controller("memory") is None:
        pytest.skip("needs a cgroup whose memory controller may be written")
    for name, script in {"plain": PLAIN, "tune": TUNE}.items():
        (tmp_path / f"{name}.py").write_text(script)
    plain = [sys.executable, str(tmp_path / "plain.py")]
    own = {"OMP_NUM_THREADS": "1", "AUTOPLACE_TIMEOUT_S": "60"}
    told = subprocess.run(plain, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, check=True).stdout
    resting, step = map(float, told.split())
    limit = int(resting + PART * step)
    hosts = [BedHost(name=name, memory_bytes=limit) for name in ("a", "b", "alone")]
    with TestBed(hosts=hosts, link=BedLink(bytes_per_ms=250_000.0), name="memory") as bed:
        cluster = bed.cluster()
        cluster = type(cluster)(devices=cluster.devices[:2], default_link=cluster.default_link)
        cluster.save(tmp_path / "cluster.yaml")
        alone = bed.popen("alone", plain, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True)
        shared = own | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29431"}
        shared |= {"MASTER_ADDR": bed.address("a"), "AUTOPLACE_CLUSTER": str(tmp_path / "cluster.yaml")}
        ranks = [
            bed.popen(
                name,
                [sys.executable, str(tmp_path / "tune.py")],
                env={**os.environ, **shared, "RANK": str(i), "GROUP_RANK": str(i), "AUTOPLACE_HOST": name},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, name in enumerate(("a", "b"))
        ]
        said = [rank.communicate(timeout=150) for rank in ranks]
        assert alone.communicate(timeout=60)[0] == "" and alone.returncode == -9
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    first, second = (json.loads(out.split("RESULT ")[1]) for out, _ in said)
    assert first == second
    assert first["shape"] in ("stages", "replicas") and all(first["feasible"])
    assert first["losses"][1] < first["losses"][0]
    assert set(first["resting"]) == {"a/cpu:0", "b/cpu:0"}
