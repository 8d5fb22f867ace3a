"""Ranks that die or raise while they train: who is left says who, in time, and training goes on after a restart."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from autoplace.hardware.cluster import Cluster, Device, Host
from autoplace.plan import Plan, Replica
from autoplace.runtime.distributed import launch

SCRIPTS = Path(__file__).parents[3] / "scripts"
TIMEOUT_S = 6

SCRIPT = """\
import os, signal, sys
import torch
from autoplace import OptimizedParallel, Plan
from pathlib import Path

folder, kills, steps = Path(sys.argv[1]), [tuple(map(int, k.split(":"))) for k in sys.argv[2].split(",") if k], 8
gone, loss = sys.argv[3:], torch.nn.functional.cross_entropy
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
model = OptimizedParallel(model, plan=Plan.load(folder / "plan.json"), loss=loss, budget_s=1)
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
    if os.environ.get("AUTOPLACE_HOST") in gone and step == 3:
        os.kill(os.getppid(), signal.SIGKILL)  # and with the agent its ranks
        signal.pause()
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


def losses_of(folder, steps=8):
    losses = dict(line.split() for line in (folder / "losses").read_text().splitlines())
    return [float(losses[str(step)]) for step in range(steps)]


@pytest.mark.parametrize("shape", ["replicas", "stages"])
def test_training_goes_on_after_ranks_were_killed(tmp_path, shape):
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
    assert losses_of(tmp_path) == pytest.approx(plain_losses(), rel=1e-4)


@pytest.mark.slow
def test_training_goes_on_without_a_host_that_is_gone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launch, "_LAST_CALL_S", 2)
    monkeypatch.setattr(launch, "_ALIVE", "keep_alive_interval=1,keep_alive_max_attempt=4")
    hosts = tuple(Host(name=n, address="127.0.0.1", launch=() if n == "a" else ("env",)) for n in "ab")
    cluster = Cluster(devices=tuple(Device(name=f"{n}/cpu:0", kind="cpu") for n in "ab"), hosts=hosts)
    cluster.save(tmp_path / "cluster.yaml")
    replicas = tuple(Replica(assignment={".": d.name}, share=0.5) for d in cluster.devices)
    Plan(replicas=replicas, strategy="test", cluster_fingerprint=cluster.fingerprint).save(tmp_path / "plan.json")
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [str(tmp_path / "train.py"), str(tmp_path), "", "b"]
    code = launch.run_script(tmp_path / "cluster.yaml", command, max_restarts=2, min_hosts=1, timeout_s=20)
    told = capfd.readouterr().err
    assert code == 0, told
    assert "autoplace: host 'b' is gone" in told
    assert "ranks were started again after: rank 1 (b/cpu:0, replica 1 of 2) was lost" in told
    assert told.count("host 'b' of the cluster file did not come; the others go on with 1 of 2 devices") == 1
    assert told.count("the plan was made for hosts that are gone (b); a new one replaces it") == 1
    assert losses_of(tmp_path) == pytest.approx(plain_losses(), rel=1e-4)


@pytest.mark.parametrize("shape", ["replicas", "sharded", "stages"])
def test_a_rank_that_is_killed_is_named_by_the_others(jobs, ranks_of, shape):
    group = ranks_of(2)
    try:
        group.run(jobs.warm_up, shape)
        victim = random.Random(shape).randrange(2)
        threading.Timer(1.5, group.signal, [victim, signal.SIGKILL]).start()
        start = time.monotonic()
        with pytest.raises(Exception, match="rank") as caught:
            group.run(jobs.train_until_told, shape, 60.0, limit_s=40)
        assert time.monotonic() - start < 20
        kind, text = caught.value.errors[1 - victim]
        assert kind == "ExecutionError", text
        named = re.search(rf"rank {victim} \(host0/cpu:{victim}, .*\) was lost: it has not answered for \d+ s", text)
        assert named or (victim == 0 and "the host of rank 0 (host0/cpu:0, " in text), text
    finally:
        group.close()


@pytest.fixture(scope="module")
def bed():
    if not SCRIPTS.exists():
        pytest.skip("needs the repository's scripts")
    sys.path.insert(0, str(SCRIPTS))
    from testbed import BedHost, BedLink, TestBed

    if reason := TestBed.missing():
        pytest.skip(reason)
    hosts = [BedHost(name=f"h{i}") for i in range(3)]
    with TestBed(hosts=hosts, link=BedLink(bytes_per_ms=125_000)) as bed:
        yield bed


FAULTS = {
    "a rank hangs": ("stages", 1, r"rank 1 \(h1/cpu:0, stage 1 of 2\) was lost: it has not answered for \d+ s"),
    "a link is cut": ("replicas", 2, r"rank 2 \(h2/cpu:0, replica 2 of 3\) was lost: it has not answered for \d+ s"),
}


@pytest.mark.testbed
@pytest.mark.parametrize("case", FAULTS)
def test_hangs_and_cut_links_are_named_by_all_others_in_time(case, bed, jobs, ranks_of, tmp_path):
    shape, victim, sentence = FAULTS[case]
    bed.cluster().save(tmp_path / "cluster.yaml")
    group = ranks_of(
        3,
        prefixes=[bed.prefix(f"h{rank}") for rank in range(3)],
        MASTER_ADDR=bed.address("h0"),
        AUTOPLACE_CLUSTER=str(tmp_path / "cluster.yaml"),
        AUTOPLACE_HOST="h{rank}",
        LOCAL_RANK="0",
        AUTOPLACE_TIMEOUT_S=str(TIMEOUT_S),
        TORCH_CPP_LOG_LEVEL="FATAL",
    )
    began = []

    def fault():
        while not (tmp_path / "under way").exists():
            time.sleep(0.02)
        time.sleep(random.Random(case).uniform(1.0, 1.5))
        began.append(time.monotonic())
        if "cut" in case:
            bed.cut(f"h{victim}")
        else:
            group.signal(victim, signal.SIGSTOP)

    threading.Thread(target=fault, daemon=True).start()
    try:
        deaf = [] if "cut" in case else [victim]
        with pytest.raises(Exception, match="rank") as caught:
            group.run(jobs.train_until_told, shape, 90.0, tmp_path / "under way", limit_s=60, deaf=deaf)
        assert time.monotonic() - began[0] < TIMEOUT_S + 12, "a step, the patience of the lookout, and a busy machine"
        told = caught.value.errors
        assert sorted(told) == [rank for rank in range(3) if rank not in deaf], "none hangs, on neither side"
        for rank in set(range(3)) - {victim}:
            assert told[rank][0] == "ExecutionError" and re.match(sentence, told[rank][1]), told
    finally:
        group.close()
        bed.heal(f"h{victim}")


def test_an_error_in_one_ranks_stage_is_told_to_the_others(jobs, two_ranks):
    told = two_ranks.run(jobs.raise_in_a_stage)
    assert all("three is a crowd" in text for text in told), told
    two_ranks.close()  # the broken step left its messages behind
