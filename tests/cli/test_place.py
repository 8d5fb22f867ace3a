"""`autoplace place`: the answer, the table, and one sentence for what cannot be."""

from __future__ import annotations

import json

import pytest

from autoplace.cli.app import run
from autoplace.errors import PolicyError
from autoplace.problem_file import load_problem
from autoplace.simulate import SimulatedEvaluator

EXAMPLE = {
    "format": "autoplace.problem/1",
    "name": "two-branches",
    "devices": [
        {"name": "host0/cuda:0", "kind": "cuda", "memory_bytes": 5000, "idle_watts": 60, "busy_watts": 300},
        {"name": "host0/cpu:0", "kind": "cpu", "memory_bytes": 9000, "idle_watts": 20, "busy_watts": 90},
    ],
    "default_link": {"latency_ms": 0.05, "bytes_per_ms": 1000000},
    "ops": [
        {"name": "embed", "latency_ms": [0.1, 0.4], "weight_bytes": 1000, "activation_bytes": 64},
        {"name": "left", "latency_ms": [2.0, 2.5], "weight_bytes": 3000, "activation_bytes": 64},
        {"name": "right", "latency_ms": [2.0, 2.5], "weight_bytes": 3000, "activation_bytes": 64},
        {"name": "head", "latency_ms": [1.5, None], "weight_bytes": 400, "activation_bytes": 64},
    ],
    "tensors": [
        {"producer": "embed", "consumers": ["left", "right"], "bytes": 4096},
        {"producer": "left", "consumers": ["head"], "bytes": 4096},
        {"producer": "right", "consumers": ["head"], "bytes": 4096},
    ],
}


@pytest.fixture
def problem(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(EXAMPLE))
    return path


@pytest.fixture(autouse=True)
def _no_default_policy(monkeypatch):
    """These tests are about placing; what the shipped policy proposes must not change them."""
    import autoplace.zoo

    def refuse(spec, **_):
        raise PolicyError(f"policy {spec!r} is not there")

    monkeypatch.setattr(autoplace.zoo, "load_policy", refuse)


def _place(*arguments):
    with pytest.raises(SystemExit) as caught:
        run(["place", *map(str, arguments)])
    return caught.value.code


def test_without_output_standard_output_is_the_answer_alone(problem, capsys):
    assert _place(problem, "--budget", 50) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["format"] == "autoplace.placement/1"
    assert answer["problem"] == "two-branches"
    assert answer["evaluations"] == 50
    assert answer["assignment"] == {
        "embed": "host0/cuda:0", "left": "host0/cuda:0", "right": "host0/cpu:0", "head": "host0/cuda:0"
    } or answer["assignment"] == {
        "embed": "host0/cuda:0", "left": "host0/cpu:0", "right": "host0/cuda:0", "head": "host0/cuda:0"
    }  # fmt: skip
    assert all(name in captured.err for name in ("single", "chunks", "heft", "metf", "dp", "guided"))
    assert "searched without a learned policy" in captured.err


def test_the_written_answer_is_what_the_simulator_says(problem, tmp_path, capsys):
    output = tmp_path / "deep" / "placement.json"
    assert _place(problem, "-o", output, "--seed", 3, "--policy", "none") == 0
    answer = json.loads(output.read_text())
    task = load_problem(problem)
    assignment = [task.cluster.index[answer["assignment"][name]] for name in task.graph.names]
    assert answer["outcome"]["latency_ms"] == SimulatedEvaluator(task).outcome(assignment).latency_ms
    assert answer["seed"] == 3
    assert answer["evaluations"] == 2000
    captured = capsys.readouterr()
    assert str(output) in captured.out
    assert "learned" not in captured.out
    assert captured.err == ""


def test_the_same_seed_gives_the_same_answer(problem, capsys):
    answers = []
    for _ in range(2):
        assert _place(problem, "--budget", 80, "--seed", 1) == 0
        answers.append(json.loads(capsys.readouterr().out) | {"seconds": 0})
    assert answers[0] == answers[1]


def test_one_strategy_alone(problem, capsys):
    assert _place(problem, "--strategy", "heft") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["strategy"] == "heft"
    assert "annealing" not in captured.err


def test_the_guided_search_alone_says_what_it_went_without(problem, capsys):
    assert _place(problem, "--strategy", "guided", "--budget", 60) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["strategy"] == "guided"
    assert "searched without a learned policy" in captured.err


def test_seconds_limit_the_search(problem, capsys):
    assert _place(problem, "--seconds", 0.2) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["seconds"] < 60  # compiling may take its time; the search itself does not
    assert answer["outcome"]["feasible"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--strategy", "greedy"), "strategy 'greedy' is unknown; use one of auto, single"),
        (("--policy", "nowhere"), "policy 'nowhere' is not there"),
        (("--strategy", "learned"), "policy 'default' is not there"),
        (("--budget", "0"), "a budget of 0 evaluations allows nothing; use 1 or more"),
        (("--strategy", "single"), "strategy 'single' found no feasible placement; use --strategy auto"),
    ],
)
def test_what_cannot_be_gets_one_sentence(arguments, sentence, problem, tmp_path, capsys):
    output = tmp_path / "placement.json"
    assert _place(problem, "-o", output, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"autoplace: {sentence}")
    assert captured.err.count("\n") == 1
    assert not output.exists()


def test_an_output_that_cannot_be_written_gets_one_sentence(problem, tmp_path, capsys):
    assert _place(problem, "-o", tmp_path) == 2
    assert "is a folder; name a file for --output" in capsys.readouterr().err
    assert _place(problem, "-o", problem / "placement.json", "--budget", 10) == 2
    captured = capsys.readouterr()
    assert "cannot be written" in captured.err
    assert captured.err.count("\n") == 1
