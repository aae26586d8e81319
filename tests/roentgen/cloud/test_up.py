"""The launcher's own decisions: which cluster, what it is told, what is taken down. The real SkyPilot is in tests/cloud."""

import json
import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from roentgen.cloud.evaluate import Afterwards, launch_and_evaluate
from roentgen.cloud.skypilot import Cluster, SkyPilot
from roentgen.cloud.task import ClusterSettings
from roentgen.cloud.up import choose, given_to, up
from roentgen.serving.local_server import LaunchError

STAND_IN = Path(__file__).parent / "sky_stand_in.py"

RUNNING = Cluster("roentgen", "UP", 1, "1x", 15)
STOPPED = Cluster("roentgen", "STOPPED", 1, "1x", 15)
OTHER = Cluster("other", "UP", 2, "2x", 15)


class StandIn(SkyPilot):
    """A `sky` that does nothing, and a provider with one instance per cluster."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state.json"
        self.state.write_text(json.dumps({"calls": [], "tasks": [], "clusters": [], "fails": {}}))
        command = folder / "sky"
        command.write_text(f'#!/bin/sh\nSTAND_IN={self.state} exec {sys.executable} {STAND_IN} "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        super().__init__(str(command))
        self.instances: list[list[str]] = [["i-1"], ["i-1"], []]

    def _in_sky(self, *arguments: str) -> Any:
        return {"provider": "aws"} if arguments[0] == "where" else self.instances.pop(0)

    def change(self, **values: Any) -> None:
        self.state.write_text(json.dumps({**json.loads(self.state.read_text()), **values}))

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [call for call in json.loads(self.state.read_text())["calls"] if call["words"][0] != "status"]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        return [yaml.safe_load(text) for text in json.loads(self.state.read_text())["tasks"]]


@pytest.fixture
def sky(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the start script has kept on the head node of every cluster: `ssh` shows it, and can do nothing else there."""
    (tmp_path / "bin").mkdir()
    kept = tmp_path / "kept"
    kept.write_text("export RAY_AUTH_TOKEN=t0ken\nexport ROENTGEN_API_KEY=a\\ key\nexport STORE=s3://b/f\n")
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\ncase "$*" in *"cat ~/.roentgen/env"*) cat {kept};; *) echo broken >&2; exit 1;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return kept


def running(name: str) -> dict[str, Any]:
    return {"name": name, "status": "UP", "nodes": 2, "resources_str": "2x", "autostop": 15}


def test_a_named_cluster_wins_and_must_run() -> None:
    clusters = [RUNNING, OTHER]
    assert choose(ClusterSettings(cluster="other", reuse=True), clusters) == OTHER
    with pytest.raises(LaunchError, match="'gpu_1' does not exist; running: roentgen, other"):
        choose(ClusterSettings(cluster="gpu_1"), clusters)
    with pytest.raises(LaunchError, match="'roentgen' is STOPPED; running: none"):
        choose(ClusterSettings(cluster="roentgen"), [STOPPED])


def test_reuse_takes_the_running_cluster_of_that_name_else_a_new_one() -> None:
    assert choose(ClusterSettings(reuse=True), [RUNNING]) == RUNNING
    assert choose(ClusterSettings(reuse=True), [OTHER]) is None
    assert (
        choose(ClusterSettings(reuse=True), [STOPPED]) == STOPPED
    )  # started again, and not this launch's to take down


def test_a_new_cluster_never_takes_the_name_of_another() -> None:
    assert choose(ClusterSettings(), [OTHER]) is None
    with pytest.raises(LaunchError, match=r"exists .UP.; use it with --reuse, or choose another --name"):
        choose(ClusterSettings(), [RUNNING])


def test_nothing_can_be_skipped_on_a_new_cluster() -> None:
    for clusters in ([], [STOPPED]):
        with pytest.raises(LaunchError, match="not possible on a new cluster"):
            choose(ClusterSettings(skip_sync=True, reuse=True), clusters)


def test_a_new_cluster_gets_keys_of_its_own_which_are_never_on_the_command_line(sky: StandIn) -> None:
    said: list[str] = []
    launched = up(ClusterSettings(model="m", min_vram=24), sky, said.append, check=False)
    assert launched.created
    (call,) = sky.calls
    assert call["words"][:4] == ["launch", "--yes", "--cluster", "roentgen"]
    assert call["words"].count("--secret") == 2
    made = list(call["secrets"].values())
    assert len(set(made)) == 2
    assert all(len(secret) == 64 for secret in made)
    assert not any(secret in text for secret in made for text in [*said, *call["words"], str(sky.tasks)])
    assert sky.tasks[0]["envs"]["MODEL"] == "m"


def test_a_reused_cluster_keeps_its_keys_its_store_and_its_size(sky: StandIn, head: Path) -> None:
    """Nodes that are new in it need them too."""
    sky.change(clusters=[running("roentgen")])
    launched = up(ClusterSettings(reuse=True), sky, lambda _: None, check=False)
    assert not launched.created
    (call,) = sky.calls
    assert call["secrets"] == {"RAY_AUTH_TOKEN": "t0ken", "ROENTGEN_API_KEY": "a key"}
    assert call["words"][-2:] == ["--env", "STORE=s3://b/f"]
    assert sky.tasks[0]["num_nodes"] == 2


def test_keys_are_never_made_anew_under_a_cluster_that_runs(sky: StandIn, head: Path) -> None:
    (head.parent / "bin" / "ssh").write_text("#!/bin/sh\necho 'no route to host' >&2; exit 255\n")
    sky.change(clusters=[running("roentgen")])
    with pytest.raises(LaunchError, match="on roentgen: no route to host"):
        up(ClusterSettings(reuse=True), sky, lambda _: None, check=False)
    assert sky.calls == []
    sky.change(clusters=[running("roentgen") | {"status": "INIT"}])  # it lost its head, and its Ray with that
    assert not up(ClusterSettings(reuse=True), sky, lambda _: None, check=False).created
    assert len(sky.calls[0]["secrets"]["RAY_AUTH_TOKEN"]) == 64


def test_the_keys_of_a_bucket_go_only_where_there_is_one() -> None:
    here = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t",
        "AWS_ENDPOINT_URL_S3": "http://minio:9000",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "HF_TOKEN": "hf",
    }
    secret, plain = given_to(ClusterSettings(store="s3://bucket/folder"), {}, here)
    assert secret.keys() == {
        "RAY_AUTH_TOKEN", "ROENTGEN_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    }  # fmt: skip
    assert plain == {
        "STORE": "s3://bucket/folder", "AWS_ENDPOINT_URL": "http://minio:9000", "AWS_REGION": "eu-central-1",
    }  # fmt: skip
    secret, plain = given_to(ClusterSettings(store="/shared"), {"STORE": "s3://another/place"}, here)
    assert secret.keys() == {"RAY_AUTH_TOKEN", "ROENTGEN_API_KEY", "HF_TOKEN"}
    assert plain == {"STORE": "/shared"}


def test_what_to_do_next_names_the_port(sky: StandIn) -> None:
    launched = up(ClusterSettings(port=8011), sky, lambda _: None, check=False)
    assert "roentgen doctor roentgen --port 8011" in launched.next_commands
    assert launched.next_commands[0].startswith("ssh -N -L 8011:localhost:8011 -L 8265:localhost:8265 roentgen ")


def test_skip_sync_only_runs_the_start_script(sky: StandIn, head: Path) -> None:
    sky.change(clusters=[running("roentgen")])
    up(ClusterSettings(reuse=True, skip_sync=True), sky, lambda _: None, check=False)
    assert sky.calls[0]["words"][:2] == ["exec", "roentgen"]


def test_a_failed_start_script_shows_its_log_and_is_not_tried_again(sky: StandIn) -> None:
    sky.change(fails={"launch": 100})
    with pytest.raises(LaunchError, match=r"(?s)the start script failed on roentgen.*launch does not work today"):
        up(ClusterSettings(), sky, lambda _: None, check=False)
    assert len(sky.calls) == 1


def test_a_launch_that_meets_no_machine_names_the_limits(sky: StandIn) -> None:
    sky.change(fails={"launch": 1})
    with pytest.raises(LaunchError, match=r"--min-vram 80 --max-price 0.1"):
        up(ClusterSettings(min_vram=80, max_price=0.1), sky, lambda _: None, check=False)


def test_a_cluster_that_lost_a_node_is_launched_twice(sky: StandIn, head: Path) -> None:
    sky.change(clusters=[running("roentgen")], fails={"launch": 1})
    with pytest.raises(LaunchError):
        up(ClusterSettings(reuse=True), sky, lambda _: None, check=False)
    assert len(sky.calls) == 2


def test_down_waits_for_the_provider(sky: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    sky.change(clusters=[running("roentgen")])
    sky.instances = [["i-1", "i-2"], ["i-1", "i-2"], ["i-2"], []]
    said: list[str] = []
    assert sky.down("roentgen", said.append) == ["i-1", "i-2"]
    assert said[-2:] == ["waiting for aws to terminate i-1, i-2", "waiting for aws to terminate i-2"]
    assert sky.calls[0]["words"] == ["down", "--yes", "--graceful", "roentgen"]


def test_instances_that_stay_are_an_error_that_names_them(sky: StandIn) -> None:
    sky.change(clusters=[running("roentgen")])
    sky.instances = [["i-1"], ["i-1"]]
    with pytest.raises(LaunchError, match=r"aws still has instances of roentgen after 0 s: i-1. THEY COST MONEY"):
        sky.down("roentgen", lambda _: None, timeout_s=0)


def test_a_down_that_fails_says_what_it_may_cost(sky: StandIn) -> None:
    sky.change(clusters=[running("roentgen")], fails={"down": 1})
    with pytest.raises(LaunchError, match=r"(?s)MAY STILL RUN AND COST MONEY.*down does not work today"):
        sky.down("roentgen", lambda _: None)
    with pytest.raises(LaunchError, match="there is no cluster 'another'"):
        sky.down("another", lambda _: None)


@pytest.mark.parametrize(
    ("before", "keep", "down"), [([], False, True), ([], True, False), ([running("roentgen")], False, False)]
)
def test_a_failure_takes_down_what_was_created_and_nothing_else(
    sky: StandIn, head: Path, before: list[dict[str, Any]], keep: bool, down: bool, tmp_path: Path
) -> None:
    """The smoke test fails: after provisioning, as it may in life."""
    sky.change(clusters=before)
    said: list[str] = []
    with pytest.raises(LaunchError, match="smoke test failed"):
        launch_and_evaluate(
            ClusterSettings(reuse=True),
            ["--samples", "3"],
            Afterwards(keep_running=keep, output=tmp_path / "run"),
            sky,
            said.append,
        )
    assert ("down" in [call["words"][0] for call in sky.calls]) is down
    end = {(False, True): "is terminated", (True, False): "COSTS MONEY until", (False, False): "keeps running"}[
        keep, down
    ]
    assert end in said[-1]


def test_activations_that_would_end_with_the_cluster_are_refused_before_anything_is_paid(
    sky: StandIn, tmp_path: Path
) -> None:
    leave = Afterwards(transfer_activations=False, output=tmp_path / "run")
    with pytest.raises(LaunchError, match="--remote-storage-only: the activations would be lost with the cluster"):
        launch_and_evaluate(ClusterSettings(), [], leave, sky, lambda _: None)
    assert sky.calls == []


def test_ctrl_c_takes_down_what_was_created(sky: StandIn, tmp_path: Path) -> None:
    def interrupted(text: str) -> None:
        if text.startswith("smoke test"):
            os.kill(os.getpid(), signal.SIGTERM)  # counts as Ctrl-C
        if text.startswith("taking"):
            os.kill(os.getpid(), signal.SIGINT)  # another one does not stop it

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        launch_and_evaluate(ClusterSettings(), [], Afterwards(output=tmp_path / "run"), sky, interrupted)
    assert [call["words"][0] for call in sky.calls] == ["launch", "down"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_missing_skypilot_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ROENTGEN_SKY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("roentgen.cloud.skypilot.ROOT", tmp_path)
    with pytest.raises(LaunchError, match="make cloud-env"):
        SkyPilot()


def test_a_launch_without_the_repository_is_refused(
    sky: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an installation from the wheel: the nodes get the repository."""
    monkeypatch.setattr("roentgen.cloud.up.TASK", tmp_path / "cluster.yaml")
    with pytest.raises(LaunchError, match="installed without it: install it from a clone"):
        up(ClusterSettings(), sky, lambda text: None)
    assert sky.calls == []
