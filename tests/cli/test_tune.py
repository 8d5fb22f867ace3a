"""`autoplace tune`: what a person gets, and one sentence for what cannot be."""

from __future__ import annotations

import json

import pytest

from autoplace.cli.app import run
from autoplace.errors import InputError
from autoplace.plan import Plan

FACTORY = """
import torch
def build():
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers).eval(), torch.randn(16, 64)
def misfit():
    return torch.nn.Linear(4, 4), torch.randn(2, 3)
"""


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return path


def _exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:
        run([str(a) for a in arguments])
    return caught.value.code


def test_a_tuning_ends_with_plan_report_results_and_the_way_to_the_ui(factory, tmp_path, capsys):
    output = tmp_path / "out"
    assert _exit_code("tune", f"{factory}:build", "-o", output, "--budget", 2, "--plans", 2) == 0
    shown = capsys.readouterr().out
    assert "plain PyTorch" in shown and "autoplace ui" in shown and str(output / "plan.json") in shown
    result = json.loads((output / "result.json").read_text())
    assert sum(c["kept"] for c in result["candidates"]) == 1
    kept = next(c for c in result["candidates"] if c["kept"])
    assert Plan.load(output / "plan.json").to_json() == kept["plan"]
    assert "plain PyTorch" in (output / "report.html").read_text()
    assert any("learned" in c["label"] for c in result["candidates"]), "the shipped policy takes part"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{factory}:misfit"], "cannot run on these inputs"),
        (["{factory}:build", "--energy-aware", "--energy-weight", "0.3"], "give one of them"),
        (["{factory}:build", "--policy", "nobody"], "'nobody'"),
        (["{factory}:build", "--run-seconds", "0"], "more than 0"),
        (["{factory}:build", "--cluster", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["{factory}:build", "-o", "{factory}"], "name another one"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(factory, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert _exit_code("tune", *(a.format(factory=factory) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("autoplace: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("**/plan.json"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("auto", "float32", 600.0)),
        (["--compile", "--precision", "auto", "--run-seconds", "90"], (True, "auto", 90.0)),
        (["--no-compile", "--precision", "float32"], (False, "float32", 600.0)),
    ],
)
def test_the_knobs_reach_the_tuner(factory, tmp_path, monkeypatch, arguments, expected):
    asked = []

    def tuned(_workload, config, **_):
        asked.append((config.compile, config.precision, config.run_s))
        raise InputError("far enough")

    monkeypatch.setattr("autoplace.cli.tune.tracked_tune", tuned)
    assert _exit_code("tune", f"{factory}:build", "-o", tmp_path / "out", *arguments) == 2
    assert asked == [expected]


def test_a_precision_that_is_none_is_refused(factory, tmp_path, capsys):
    assert _exit_code("tune", f"{factory}:build", "-o", tmp_path / "out", "--precision", "float8") == 2
    error = capsys.readouterr().err
    assert "float8" in error and "auto" in error
