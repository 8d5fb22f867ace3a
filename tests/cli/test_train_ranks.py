"""`autoplace train --stage measure` over the hosts of a cluster file; both are this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from autoplace.cli.app import run
from autoplace.plan import Plan
from autoplace.policy.policy import Policy

FACTORY = """\
import os
import torch

def build():
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(3)]
    return torch.nn.Sequential(*layers), torch.randn(16, 64)

def fails_on_one():
    if os.environ["RANK"] == "1":
        raise LookupError("no such model here")
    return build()
"""
PROGRAM = "from autoplace.cli import main; main()"

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


def _train(cluster, folder, *options, function="build"):
    (folder / "factory.py").write_text(FACTORY)
    words = ["train", "--stage", "measure", "--cluster", str(cluster), "--model", f"{folder / 'factory.py'}:{function}",
             "--output", str(folder / "out"), "--groups-measure", "3", "--held-out", "1", "--captured", "0",
             "--max-ops", "12", "--max-devices", "2", "--tracking-uri", f"sqlite:///{folder}/ml.db"]  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, *words, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_two_hosts_refine_a_policy_by_real_runs(cluster_file, tmp_path):
    done = _train(cluster_file, tmp_path, "--plans-measure", "10")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    policy = Policy.load(tmp_path / "out" / "policy")
    assert "PPO on real runs: 10 plans" in policy.card and "Started from: default" in policy.card
    episodes = [json.loads(line) for line in (tmp_path / "out" / "measured.jsonl").read_text().splitlines()]
    assert len(episodes) == 10
    rewarded = [e for e in episodes if e["outcome"]["source"] == "measured"]
    assert all(e["feasible"] and e["outcome"]["latency_ms"] > 0 for e in rewarded)
    lines = [json.loads(line) for line in (tmp_path / "out" / "outcomes.jsonl").read_text().splitlines()]
    assert {line["outcome"]["source"] for line in lines} == {"measured"}
    assert {"single", "stages"} <= {Plan.from_json(line["plan"]).shape for line in lines}


def test_what_fails_on_one_rank_is_one_sentence(cluster_file, tmp_path):
    done = _train(cluster_file, tmp_path, function="fails_on_one")
    assert done.returncode == 2
    assert "no such model here" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stage", "simulate"], "real runs alone"),
        (["--inference"], "a training step is measured"),
        (["--model", "other.py:build"], "one model is run"),
    ],
)
def test_what_hosts_do_not_do_is_refused_at_once(cluster_file, tmp_path, capsys, words, sentence):
    usual = ["--stage", "measure", "--cluster", str(cluster_file), "--model", "factory.py:build"]
    with pytest.raises(SystemExit) as end:
        run(["train", *usual, "--output", str(tmp_path / "out"), *words])
    assert end.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
