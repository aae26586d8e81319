"""cluster.yaml, rewritten for a launch. What SkyPilot makes of it is tested in tests/cloud."""

from pathlib import Path

import pytest
import yaml

from roentgen.cloud.skypilot import ROOT
from roentgen.cloud.task import ClusterSettings, rewrite, write
from roentgen.options import OptionError, read_options


def written(folder: Path, **options: object) -> dict:  # type: ignore[type-arg]
    write(ROOT / "cluster.yaml", folder / "task.yaml", ClusterSettings.model_validate(options))
    return dict(yaml.safe_load((folder / "task.yaml").read_text()))


def test_memory_and_price_go_into_the_file(tmp_path: Path) -> None:
    task = written(tmp_path, min_vram=24, gpus=2, max_price=1.5, spot=True, infra="aws/us-east-1", idle_minutes=5)
    resources = task["resources"]
    assert resources["accelerators"] == "24GB+:2"
    assert resources["max_hourly_cost"] == 1.5
    assert resources["use_spot"] is True
    assert resources["infra"] == "aws/us-east-1"
    assert resources["autostop"] == {"idle_minutes": 5, "down": True, "wait_for": "jobs"}
    assert "ports" not in resources
    assert task["workdir"] == str(ROOT)


def test_a_machine_without_gpu(tmp_path: Path) -> None:
    resources = written(tmp_path, min_vram=0)["resources"]
    assert "accelerators" not in resources
    assert resources["cpus"] == "4+"


def test_a_cluster_that_exists_is_not_asked_for_other_machines() -> None:
    task = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    resources = rewrite(task, ClusterSettings(min_vram=80, spot=True, idle_minutes=5), exists=True)["resources"]
    assert resources == {"autostop": {"idle_minutes": 5, "down": True, "wait_for": "jobs"}}


def test_the_port_is_opened_only_if_asked(tmp_path: Path) -> None:
    task = written(tmp_path, port=8011, open_port=True)
    assert task["resources"]["ports"] == 8011
    assert task["envs"]["PORT"] == "8011"


def test_without_a_sync_there_is_nothing_but_the_start_script(tmp_path: Path) -> None:
    task = written(tmp_path, skip_sync=True, reuse=True)
    assert "workdir" not in task
    assert "setup" not in task
    assert task["run"] == "cd ~/sky_workdir && bash cluster/start.sh"


def test_no_secret_is_ever_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "ROENTGEN_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "s3cr3t")
    assert set(written(tmp_path)["secrets"].values()) == {""}
    assert "s3cr3t" not in (tmp_path / "task.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 2}, "--nodes 2 needs a store that every node can write"),
        ({"min_vram": -1}, r"--min-vram: .*\(given: -1\)"),
        ({"name": "Big Cluster"}, r"--name: .*\(given: 'Big Cluster'\)"),
        ({"port": 80}, r"--port: .*\(given: 80\)"),
        ({"max_price": 0}, r"--max-price: .*\(given: 0\)"),
    ],
)
def test_a_setting_that_cannot_be_is_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        read_options(ClusterSettings, options)


def test_ways_of_syncing_exclude_one_another() -> None:
    flags = [{}, {"skip_sync": True}, {"frozen_sync": True}, {"fresh": True}]
    assert [ClusterSettings.model_validate(given).sync for given in flags] == ["full", "skip", "frozen", "fresh"]
    with pytest.raises(OptionError, match="mutually exclusive"):
        read_options(ClusterSettings, {"skip_sync": True, "fresh": True})
