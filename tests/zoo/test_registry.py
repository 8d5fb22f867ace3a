"""The MLflow model registry: what was registered comes back, checked."""

import pytest

from autoplace.errors import PolicyError, TrackingError
from autoplace.policy.store import read_policy, write_policy
from autoplace.zoo._client import open_client
from autoplace.zoo.registry import download_policy, register_policy
from autoplace.zoo.store import find_policy


def test_a_registered_policy_comes_back_by_alias(store_uri, policy_dir, data_dir):
    assert register_policy(policy_dir, "small", "champion", store_uri) == 1
    found = find_policy("models:/small@champion", tracking_uri=store_uri)
    assert found.is_relative_to(data_dir)
    assert (found / "SHA256SUMS").read_bytes() == (policy_dir / "SHA256SUMS").read_bytes()
    assert download_policy("models:/small/1", tracking_uri=store_uri) == found


def test_the_alias_moves_to_the_next_version(store_uri, policy_dir):
    register_policy(policy_dir, "moving", "champion", store_uri)
    stored = read_policy(policy_dir)
    write_policy(policy_dir, stored.tensors, {"hidden": 4}, "", {})
    assert register_policy(policy_dir, "moving", "champion", store_uri) == 2
    found = download_policy("models:/moving@champion", tracking_uri=store_uri)
    assert read_policy(found).config["hidden"] == 4
    first = download_policy("models:/moving/1", tracking_uri=store_uri)
    assert read_policy(first).config["hidden"] == 3


def test_a_damaged_download_is_refused_and_not_kept(store_uri, policy_dir, data_dir):
    version = register_policy(policy_dir, "damaged", None, store_uri)
    source = open_client(store_uri).get_model_version("damaged", str(version)).source
    from pathlib import Path
    from urllib.parse import unquote

    stored = Path(unquote(source.removeprefix("file://"))) / "policy.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(PolicyError, match="holds no good policy"):
        download_policy("models:/damaged/1", tracking_uri=store_uri)
    assert list((data_dir / "policies").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/absent@champion", "is not registered"),
        ("models:/absent/1", "is not registered"),
        ("models:/absent", "names no registered policy"),
        ("models:/../x@y", "names no registered policy"),
    ],
)
def test_what_is_not_there_is_one_sentence(store_uri, uri, message):
    with pytest.raises(PolicyError, match=message):
        download_policy(uri, tracking_uri=store_uri)


@pytest.mark.parametrize(("name", "alias"), [("a/b", "x"), ("", "x"), ("a", "v1"), ("a", "latest"), ("a", "x y")])
def test_names_that_mlflow_would_refuse_are_refused_first(store_uri, policy_dir, name, alias):
    with pytest.raises(PolicyError, match="cannot"):
        register_policy(policy_dir, name, alias, store_uri)


def test_a_bad_policy_is_not_registered(store_uri, policy_dir):
    (policy_dir / "card.md").unlink()
    with pytest.raises(PolicyError, match=r"card\.md"):
        register_policy(policy_dir, "bad", "champion", store_uri)


def test_a_registry_that_is_down_is_one_sentence(policy_dir):
    with pytest.raises(TrackingError, match="did not register"):
        register_policy(policy_dir, "small", "champion", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match="cannot be reached"):
        download_policy("models:/small@champion", tracking_uri="http://127.0.0.1:9")
