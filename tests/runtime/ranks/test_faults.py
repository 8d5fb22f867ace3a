"""Ranks that die or raise while they train: who is left says who, in time, and training goes on after a restart."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

SCRIPT = """\
import os, signal, sys
import torch
from autoplace import OptimizedParallel, Plan
from pathlib import Path

folder, kills, steps = Path(sys.argv[1]), [tuple(map(int, k.split(":"))) for k in sys.argv[2].split(",") if k], 8
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
model = OptimizedParallel(model, plan=Plan.load(folder / "plan.json"), loss=torch.nn.functional.cross_entropy)
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
first = 0
if (folder / "checkpoint").exists():
    first = model.load_checkpoint(folder / "checkpoint", optimizer)["step"]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
for step in range(first, steps):
    own = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 8, generator=own), torch.randint(0, 4, (12,), generator=own)
    if attempt < len(kills) and kills[attempt] == (int(os.environ["RANK"]), step):
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    loss = float(model.train_step(x, y))
    optimizer.step()
    model.save_checkpoint(folder / "checkpoint", optimizer, step=step + 1)
    if os.environ["RANK"] == "0":
        with (folder / "losses").open("a") as file:
            file.write(f"{step} {loss!r}\\n")
"""


def plain_losses(steps=8):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        own = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 8, generator=own), torch.randint(0, 4, (12,), generator=own)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", ["replicas", "stages"])
def test_training_goes_on_after_ranks_were_killed(tmp_path, shape):
    from autoplace.plan import Plan, Replica

    names = ("host0/cpu:0", "host0/cpu:1")
    if shape == "replicas":
        replicas = tuple(Replica(assignment={".": n}, share=s) for n, s in zip(names, (0.75, 0.25), strict=True))
    else:
        replicas = (Replica(assignment={"0": names[0], "1": names[0], "2": names[1]}),)
    Plan(replicas=replicas, strategy="test").save(tmp_path / "plan.json")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "3", str(script), str(tmp_path), "1:2,0:5"]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = dict(line.split() for line in (tmp_path / "losses").read_text().splitlines())
    assert [float(losses[str(step)]) for step in range(8)] == pytest.approx(plain_losses(), rel=1e-4)


@pytest.mark.parametrize("shape", ["replicas", "stages"])
def test_a_rank_that_is_killed_is_named_by_the_others(jobs, ranks_of, shape):
    group = ranks_of(2)
    try:
        group.run(jobs.warm_up, shape)
        victim = random.Random(shape).randrange(2)
        threading.Timer(1.5, group.kill, [victim]).start()
        start = time.monotonic()
        with pytest.raises(Exception, match="rank") as caught:
            group.run(jobs.train_until_told, shape, 60.0, limit_s=40)
        assert time.monotonic() - start < 20
        kind, text = caught.value.errors[1 - victim]
        assert kind == "ExecutionError", text
        named = re.search(rf"rank {victim} \(host0/cpu:{victim}, .*\) was lost: it has not answered for \d+ s", text)
        assert named or (victim == 0 and "the host of rank 0 (host0/cpu:0) was lost" in text), text
    finally:
        group.close()


def test_an_error_in_one_ranks_stage_is_told_to_the_others(jobs, two_ranks):
    told = two_ranks.run(jobs.raise_in_a_stage)
    assert all("three is a crowd" in text for text in told), told
    two_ranks.close()  # the broken step left its messages behind
