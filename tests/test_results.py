"""Where benchmarks say that their results come from."""

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("needs the repository's scripts", allow_module_level=True)


def test_changed_results_leave_a_commit_clean_and_changed_code_does_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from results import provenance

    def git(*words):
        own = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "docs" / "results").mkdir(parents=True)
    code, kept = tmp_path / "code.py", tmp_path / "docs" / "results" / "one.json"
    code.write_text("a = 1\n")
    kept.write_text("{}\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.chdir(tmp_path)
    clean = provenance(seed=0)["commit"]
    assert clean and clean != "unknown" and "dirty" not in clean
    kept.write_text('{"a": 1}\n')
    assert provenance(seed=0)["commit"] == clean
    monkeypatch.chdir(tmp_path / "docs")
    code.write_text("a = 2\n")
    assert provenance(seed=0)["commit"] == f"{clean}-dirty"
