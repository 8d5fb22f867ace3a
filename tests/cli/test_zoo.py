"""`autoplace zoo`: what it prints, and exit code 2 with one sentence for what it refuses."""

import shutil

import numpy as np
import pytest

from autoplace.cli.app import run
from autoplace.policy.store import write_policy
from autoplace.zoo import store


@pytest.fixture
def policy(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tensors = {"w": np.ones(3, np.float32)}
    card = "# Small\n\nPlaces small things.\n"
    directory = write_policy(tmp_path / "shelf" / "small", tensors, {"hidden": 3}, card, {"ratio": 0.97})
    monkeypatch.setattr(store, "pretrained_directory", lambda: tmp_path / "shelf")
    return directory


def autoplace(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        run(["zoo", *map(str, words)])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_list_names_every_policy_and_what_is_wrong_with_one(policy, capsys):
    shutil.copytree(policy, policy.parent / "broken")
    (policy.parent / "broken" / "card.md").write_text("changed")
    code, out, _ = autoplace(capsys, "list")
    assert code == 0
    assert "small" in out and "Places small things" in out
    assert "broken" in out and "cannot be used" in out


def test_list_of_an_empty_shelf_says_what_to_do(policy, capsys):
    shutil.rmtree(policy)
    code, out, _ = autoplace(capsys, "list")
    assert code == 0 and "autoplace train" in out


def test_show_prints_card_config_and_evaluation(policy, capsys):
    code, out, _ = autoplace(capsys, "show", "small")
    assert code == 0
    assert "Places small things." in out and '"hidden": 3' in out and '"ratio": 0.97' in out and str(policy) in out


def test_show_of_an_unknown_policy_names_the_known(policy, capsys):
    code, out, err = autoplace(capsys, "show", "large")
    assert (code, out) == (2, "")
    assert "(small)" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", [(), ("small",)])
def test_verify_says_ok_for_every_file(policy, capsys, name):
    code, out, _ = autoplace(capsys, "verify", *name)
    assert code == 0
    assert out.count("  ok  ") == 4 and "FAILED" not in out


def test_verify_of_a_damaged_policy_exits_with_2(policy, capsys):
    (policy / "eval.json").write_text("{}")
    code, out, err = autoplace(capsys, "verify")
    assert code == 2
    assert "FAILED  eval.json" in out
    assert "does not match its checksum" in err and "Traceback" not in err


def test_register_prints_the_uri_to_use(policy, capsys, monkeypatch):
    from autoplace.zoo import registry

    asked = []
    monkeypatch.setattr(registry, "register_policy", lambda *words: asked.append(words) or 4)
    code, out, _ = autoplace(capsys, "register", policy, "--name", "small", "--alias", "champion")
    assert code == 0 and "models:/small@champion" in out
    assert asked == [(policy, "small", "champion", None)]


def test_register_of_no_policy_is_one_sentence(policy, tmp_path, capsys):
    code, _, err = autoplace(capsys, "register", tmp_path / "nowhere", "--name", "small")
    assert code == 2 and "nowhere does not exist" in err
