import pytest

from autoplace.agents.ppo import PpoConfig
from autoplace.agents.ppo_file import load_ppo, save_ppo
from autoplace.cli.app import run
from autoplace.policy.network import PolicyConfig, PolicyNetwork
from autoplace.policy.policy import Policy

TINY = ["--steps", "256", "--problems", "3", "--instances", "4", "--max-ops", "10", "--confirmations", "1"]


@pytest.fixture
def call(tmp_path):
    Policy.of(PolicyNetwork(PolicyConfig(hidden=8), seed=0)).save(tmp_path / "policy", card="a start", evaluation={})
    save_ppo(tmp_path / "base.json", PpoConfig(envs=2, steps=8, batch_size=64, epochs=1, warmup_updates=0))

    def go(*words):
        given = ["-o", str(tmp_path / "out"), "--start", str(tmp_path / "policy"), "--ppo", str(tmp_path / "base.json")]
        with pytest.raises(SystemExit) as end:
            run(["tune-agent", *given, *TINY, *words])
        return end.value.code or 0

    return go


def test_trials_are_runs_below_the_study(call, tmp_path, capsys):
    store = f"sqlite:///{tmp_path}/ml.db"
    assert call("--trials", "2", "--tracking-uri", store) == 0
    shown = capsys.readouterr().out
    assert "2 trials:" in shown and "best.json holds" in shown
    (rates,) = [line for line in shown.splitlines() if "learning_rate" in line]
    assert "0.001" in rates
    import mlflow

    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("autoplace-tune-agent")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2 and len(runs) == 3
    first = min(children, key=lambda r: r.info.run_name)
    assert first.data.params["ppo.learning_rate"] == str(PpoConfig().learning_rate)
    assert {"validation/reward", "instance/log_ratio", "ppo/reward"} <= set(first.data.metrics)
    assert parent.data.metrics["search/instances"] == 4 and parent.info.status == "FINISHED"
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"best.json", "study.journal"}
    ppo = load_ppo(tmp_path / "out" / "best.json")
    assert parent.data.params["best.learning_rate"] == str(ppo.learning_rate)


def test_a_server_that_is_down_costs_a_warning_and_the_study_goes_on(call, tmp_path, capsys, caplog):
    assert call("--trials", "1", "--tracking-uri", "http://127.0.0.1:9") == 0
    assert any("autoplace sync" in record.getMessage() for record in caplog.records)
    assert (tmp_path / "out" / "best.json").exists()
    assert call("--trials", "2", "--tracking-uri", f"sqlite:///{tmp_path}/ml.db") == 0
    assert "2 trials:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trials", "0"], "trials is 0"),
        (["--start", "no-such-policy"], "no-such-policy"),
        (["--ppo", "missing.json"], "missing.json does not exist"),
        (["--steps", "10"], "steps is 10"),
    ],
)
def test_bad_input_is_one_sentence(call, tmp_path, capsys, words, sentence):
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
