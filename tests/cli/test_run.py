import pytest
import typer
from typer.testing import CliRunner

from autoplace.cli.run import run
from autoplace.errors import ClusterFileError, InputError

app = typer.Typer()
app.command(context_settings={"allow_interspersed_args": False})(run)


@pytest.fixture
def started(monkeypatch):
    """What would be run; the code that it ends with stands in front."""
    calls = [0]

    def run_script(cluster, command, **options):
        calls.append((str(cluster), command, options))
        return calls[0]

    monkeypatch.setattr("autoplace.runtime.distributed.launch.run_script", run_script)
    return calls


def invoke(*words):
    return CliRunner().invoke(app, list(words))


def test_options_before_the_script_are_ours(started):
    assert (
        invoke("--cluster", "c.yaml", "--max-restarts", "2", "--timeout", "9", "train.py", "--lr", "1").exit_code == 0
    )
    assert started[1:] == [
        ("c.yaml", ["train.py", "--lr", "1"], {"max_restarts": 2, "min_hosts": None, "timeout_s": 9.0})
    ]


def test_fewer_hosts_may_be_enough(started):
    invoke("--min-hosts", "2", "train.py")
    invoke("--min-hosts", "2", "--max-restarts", "9", "train.py")
    told = [options for _, _, options in started[1:]]
    assert told == [{"max_restarts": n, "min_hosts": 2, "timeout_s": None} for n in (3, 9)]
    assert invoke("--min-hosts", "0", "train.py").exit_code == 2


def test_a_module(started):
    assert invoke("-m", "package.train").exit_code == 0
    assert started[1:] == [
        ("cluster.yaml", ["-m", "package.train"], {"max_restarts": 0, "min_hosts": None, "timeout_s": None})
    ]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_the_exit_code_is_the_scripts(started, code):
    started[0] = code
    assert invoke("train.py").exit_code == code


def test_bad_options(started):
    assert isinstance(invoke("--timeout", "0", "train.py").exception, InputError)
    assert invoke("--max-restarts", "-1", "train.py").exit_code == 2
    assert invoke("--nonsense", "train.py").exit_code == 2
    assert invoke().exit_code == 2
    assert started == [0]


def test_a_cluster_file_that_is_not_there(tmp_path):
    result = invoke("--cluster", str(tmp_path / "none.yaml"), "train.py")
    assert isinstance(result.exception, ClusterFileError) and "does not exist" in str(result.exception)
