import json
from pathlib import Path

import pytest

from autoplace.agents.ppo import PpoConfig
from autoplace.agents.ppo_file import save_ppo
from autoplace.cli.app import run
from autoplace.outcome import Outcome
from autoplace.plan import Plan
from autoplace.policy.policy import Policy
from autoplace.problem_file import load_problem, problem_to_json

TINY = ["--problems", "3", "--captured", "0", "--max-ops", "12", "--max-devices", "3", "--teacher-evaluations", "40"]
TINY += [
    "--epochs",
    "1",
    "--hidden",
    "8",
    "--validation",
    "3",
    "--held-out",
    "3",
    "--workers",
    "1",
    "--stage",
    "imitate",
]


def call(*words):
    with pytest.raises(SystemExit) as end:
        run(["train", *words])
    return end.value.code or 0


def test_train_writes_a_policy_and_says_where(tmp_path, capsys):
    store = f"sqlite:///{tmp_path}/ml.db"
    assert call("-o", str(tmp_path / "out"), *TINY, "--tracking-uri", store) == 0
    policy = Policy.load(tmp_path / "out" / "policy")
    assert "--stage imitate" in policy.card or "autoplace" in policy.card
    assert "Policy:" in capsys.readouterr().out
    import mlflow

    client = mlflow.MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "autoplace-train"]
    (mlflow_run,) = client.search_runs([experiment.experiment_id])
    assert "validation/reward" in mlflow_run.data.metrics and mlflow_run.data.params["seed"] == "0"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stage", "fly"], "stage 'fly' is unknown"),
        (["--stage", "measure"], "--model"),
        (["--policy", "no-such-policy", "--stage", "imitate"], "no-such-policy"),
        (["--model", "missing.py:build"], "missing.py"),
        (["--ppo", "missing.json"], "missing.json does not exist"),
        (["--without", "wings"], "no part 'wings'"),
        (["--without", "imitation", "--stage", "imitate"], "no stage to train"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, words, sentence):
    assert call("-o", str(tmp_path / "out"), *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not Path(tmp_path / "out").exists()


def test_records_of_earlier_tunings_are_learned_from(tmp_path, capsys):
    folder = tmp_path / "records"
    folder.mkdir()
    problem = load_problem(Path(__file__).parents[2] / "examples" / "three_layers.json")
    plan = Plan.from_assignment(problem, [0] * problem.num_ops, strategy="x")
    row = {"label": "x", "plan": plan.to_json(), "outcome": Outcome(source="measured", objective=2.0).to_json()}
    line = {"type": "experience", "problem": problem_to_json(problem), "plans": [row]}
    (folder / "a.jsonl").write_text(json.dumps(line) + "\n")
    words = ["-o", str(tmp_path / "out"), *TINY, "--tracking-uri", f"sqlite:///{tmp_path}/ml.db"]
    assert call(*words, "--records-dir", str(folder)) == 0
    assert "plans of 1 tuned problem" in capsys.readouterr().out
    assert call(*words, "--records-dir", str(tmp_path / "missing")) == 2
    assert "no folder" in capsys.readouterr().err


def test_hyperparameters_come_from_a_file(tmp_path):
    save_ppo(tmp_path / "best.json", PpoConfig(learning_rate=0.0007, envs=3))
    store = f"sqlite:///{tmp_path}/ml.db"
    assert call("-o", str(tmp_path / "out"), *TINY, "--ppo", str(tmp_path / "best.json"), "--tracking-uri", store) == 0
    import mlflow

    client = mlflow.MlflowClient(store)
    (mlflow_run,) = client.search_runs([client.get_experiment_by_name("autoplace-train").experiment_id])
    assert "'learning_rate': 0.0007, 'envs': 3" in mlflow_run.data.params["ppo"]


def test_an_ablation_is_recorded_and_missing_transformers_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("autoplace.agents.captured.available", lambda: False)
    monkeypatch.setattr("autoplace.agents.train.available", lambda: False)
    words = [*TINY, "--captured", "0.5", "--without", "message-passing", "--without", "masks"]
    assert call("-o", str(tmp_path / "out"), *words, "--tracking-uri", f"sqlite:///{tmp_path}/ml.db") == 0
    assert capsys.readouterr().out.count("transformers is not installed") == 1
    policy = Policy.load(tmp_path / "out" / "policy")
    assert not policy.config.message_passing and not policy.config.masks
    assert "without: message-passing, masks" in policy.card
    assert "models" not in policy.evaluation["training"]["trained_on"]
