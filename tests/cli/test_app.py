"""The command line: help without heavy imports, one sentence and exit code 2 for a user's error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autoplace.cli.app import VERBS, ZOO_VERBS, run
from autoplace.errors import AutoplaceError


def _exit_code(*arguments):
    with pytest.raises(SystemExit) as caught:
        run(list(arguments))
    return caught.value.code


def test_help_names_every_verb(capsys):
    assert _exit_code("--help") == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in [*VERBS, "zoo"])


def test_every_verb_can_be_loaded(capsys):
    for verb in VERBS:
        assert _exit_code(verb, "--help") == 0
    for verb in ZOO_VERBS:
        assert _exit_code("zoo", verb, "--help") == 0
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_verb_and_unknown_option_exit_with_2(capsys):
    assert _exit_code("nonsense") == 2
    assert _exit_code("place", "--nonsense") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_ours_is_one_sentence(capsys):
    assert _exit_code("place", "nowhere.json") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("autoplace: nowhere.json does not exist")
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback():
    with pytest.raises(AutoplaceError):
        run(["place", "nowhere.json", "--debug"])


def test_what_follows_a_script_belongs_to_the_script(monkeypatch):
    started = []
    monkeypatch.setattr(
        "autoplace.runtime.distributed.launch.run_script",
        lambda cluster, command, **options: started.append(command) or 5,
    )
    words = ["train.py", "--debug", "--cluster", "theirs", "-m", "--help", "--", "tune"]
    assert _exit_code("run", "--cluster", "ours.yaml", *words) == 5
    assert started == [words]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom autoplace.cli.app import run\n"
        "try:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('mlflow', 'stable_baselines3', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
