"""What serve.yaml becomes for a launch."""

import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from roentgen.cloud.deploy import ROOT, put, render, version_hash
from roentgen.serving.local_server import LaunchError
from serve_app.config import ServerConfig

CHOICES = {"MODEL": "some/model", "STORE": "s3://bucket/folder"}


def rendered(nodes: int = 1, gpus: int = 0, args: dict[str, Any] | None = None, **environment: str) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "serve.yaml").read_text())
    config["applications"][0]["args"] |= args or {}
    return render(config, {**CHOICES, **environment}, nodes, gpus, "c0de")


def arguments(config: dict[str, Any]) -> ServerConfig:
    return ServerConfig.model_validate(config["applications"][0]["args"])


def test_the_launch_chooses_and_serve_yaml_keeps_the_rest() -> None:
    config = rendered(PORT="8123", REPLICAS="")
    assert (arguments(config).model, arguments(config).store) == ("some/model", "s3://bucket/folder")
    assert (arguments(config).dtype, arguments(config).revision, arguments(config).max_batch) == ("auto", None, 32)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}


def test_the_launch_may_choose_precision_and_revision() -> None:
    config = arguments(rendered(DTYPE="float16", REVISION="0123abc"))
    assert (config.dtype, config.revision) == ("float16", "0123abc")


def test_only_a_server_with_a_key_listens_on_the_network() -> None:
    assert rendered(ROENTGEN_API_KEY="")["http_options"]["host"] == "127.0.0.1"
    config = rendered(ROENTGEN_API_KEY="secret")
    assert config["http_options"]["host"] == "0.0.0.0"
    assert "secret" not in yaml.safe_dump(config)


@pytest.mark.parametrize(
    ("nodes", "gpus", "args", "replicas", "per_node"),
    [
        (1, 0, {}, 1, 1),
        (3, 0, {}, 3, 1),
        (2, 4, {}, 8, 4),
        (2, 4, {"num_gpus": 2}, 4, 2),
        (1, 4, {"num_gpus": 4}, 1, 1),
    ],
)
def test_there_is_a_replica_for_every_place(
    nodes: int, gpus: int, args: dict[str, Any], replicas: int, per_node: int
) -> None:
    config = arguments(rendered(nodes, gpus, args))
    assert (config.num_replicas, config.max_replicas_per_node, config.num_ingresses) == (replicas, per_node, nodes)


def test_replicas_may_grow_inside_the_cluster() -> None:
    config = arguments(rendered(4, 0, REPLICAS="1", MAX_REPLICAS="4"))
    assert (config.num_replicas, config.max_replicas) == (1, 4)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"REPLICAS": "3"}, "2 nodes with 0 GPUs have room for 1 to 2"),
        ({"REPLICAS": "2", "MAX_REPLICAS": "1"}, "REPLICAS=2 and MAX_REPLICAS=1"),
        ({"REPLICAS": "0"}, "REPLICAS=0"),
        ({"PORT": "http"}, "PORT=http: not an integer"),
    ],
)
def test_a_choice_that_cannot_be_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        rendered(2, **environment)


def test_a_model_that_takes_more_gpus_than_a_node_has_is_refused() -> None:
    with pytest.raises(LaunchError, match="have room for 1 to 0"):
        rendered(2, 1, {"num_gpus": 2}, REPLICAS="1")


def test_where_the_bucket_is_reaches_replicas_and_its_keys_never_do_this_way() -> None:
    config = rendered(AWS_ENDPOINT_URL="http://minio:9000", AWS_REGION="", AWS_SECRET_ACCESS_KEY="s3cr3t")
    variables = config["applications"][0]["runtime_env"]["env_vars"]
    assert variables == {"ROENTGEN_VERSION": "c0de", "AWS_ENDPOINT_URL": "http://minio:9000"}


def test_other_code_or_other_keys_are_another_version(tmp_path: Path) -> None:
    for folder in ("serve_app", "roentgen"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    keys = tmp_path / "aws"
    versions = [version_hash(keys, tmp_path)]
    (tmp_path / "roentgen" / "cli" / "console.py").write_text("")  # replicas do not run it
    assert version_hash(keys, tmp_path) == versions[0]
    for changed in (tmp_path / "serve_app" / "app.py", keys):
        changed.write_text("another")
        versions.append(version_hash(keys, tmp_path))
    assert len(set(versions)) == 3


def serve_that_answers(*statuses: int) -> httpx2.Client:
    """A Serve that answers with these statuses in turn, and then always with the last."""
    left = list(statuses)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(left.pop(0) if len(left) > 1 else left[0], text="why it is so")

    return httpx2.Client(transport=httpx2.MockTransport(answer))


def test_a_serve_that_is_slow_to_start_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roentgen.cloud.deploy.RETRY_S", 0)
    put(serve_that_answers(500, 500, 200), {})
    with pytest.raises(LaunchError, match="failed to accept the application roentgen: why it is so"):
        put(serve_that_answers(500), {}, timeout_s=0)
    with pytest.raises(LaunchError, match="refused the application roentgen: 400: why it is so"):
        put(serve_that_answers(400, 200), {})


def test_the_launch_may_choose_what_vllm_taps() -> None:
    assert arguments(rendered()).taps == ("default",)
    assert arguments(rendered(TAPS="default,resid_mid")).taps == ("default", "resid_mid")
    assert arguments(rendered(1, 4, {"taps": ["resid_post"]}, TAPS="")).taps == ("resid_post",)


def test_the_launch_may_choose_an_engine() -> None:
    assert arguments(rendered()).engine == "auto"
    assert arguments(rendered(ENGINE="vllm")).engine == "vllm"
    assert arguments(rendered(1, 4, {"engine": "transformers"}, ENGINE="")).engine == "transformers"
    split = arguments(rendered(2, 4, {"engine": "vllm", "tensor_parallel_size": 2}))
    assert (split.num_replicas, split.tensor_parallel_size) == (4, 2)
