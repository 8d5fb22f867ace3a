"""`autoplace tune` over the hosts of a cluster file; both are this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from autoplace.hardware.cluster import Cluster
from autoplace.plan import Plan

FACTORY = """\
import torch

def build():
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(4)]
    return torch.nn.Sequential(*layers), torch.randn(16, 64)
"""
PROGRAM = "from autoplace.cli import main; main()"


def _tune(cluster, folder, *options):
    (folder / "factory.py").write_text(FACTORY)
    command = [sys.executable, "-c", PROGRAM, "tune", f"{folder / 'factory.py'}:build", "--cluster", str(cluster),
               "--output", str(folder / "out"), "--policy", "none", *options]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_hosts_tune_a_training_step(cluster_file, tmp_path):
    done = _tune(cluster_file, tmp_path, "--budget", "4")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert set(plan.devices) <= {"a/cpu:0", "b/cpu:0"}
    assert plan.cluster_fingerprint == Cluster.load(cluster_file).fingerprint
    runs = [json.loads(line) for line in (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()]
    shapes = {Plan.from_json(run["plan"]).shape for run in runs if run["outcome"]["feasible"]}
    assert {"single", "replicas", "stages"} <= shapes and len(runs) <= 100
    assert "kept" in (tmp_path / "out" / "explain.txt").read_text()


def test_inference_over_hosts_is_refused(cluster_file, tmp_path):
    done = _tune(cluster_file, tmp_path, "--inference")
    assert done.returncode == 2 and "a training step is tuned" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
