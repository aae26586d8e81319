"""Defaults: files that cannot import them repeat them truly."""

from pathlib import Path
from typing import Any

import yaml

from roentgen.cloud.task import ClusterSettings, rewrite
from roentgen.defaults import CLUSTER_MODEL, CLUSTER_NAME, DASHBOARD_PORT, HOST, PORT

ROOT = Path(__file__).parents[2]


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text()))


def test_serve_yaml_has_the_server_s() -> None:
    config = read("serve.yaml")
    assert config["http_options"] == {"host": HOST, "port": PORT}


def test_cluster_yaml_has_the_cluster_s() -> None:
    task = read("cluster.yaml")
    assert task["envs"]["PORT"] == str(PORT)
    assert task["envs"]["MODEL"] == CLUSTER_MODEL
    usual = rewrite(task, ClusterSettings(port=PORT))
    assert {name: usual[name] for name in ("name", "num_nodes", "resources")} == {
        name: task[name] for name in ("name", "num_nodes", "resources")
    }
    assert {**usual["envs"], "SYNC": "full"} == task["envs"]
    tunnel = f"ssh -N -L {PORT}:localhost:{PORT} -L {DASHBOARD_PORT}:localhost:{DASHBOARD_PORT} {CLUSTER_NAME}"
    assert tunnel in (ROOT / "cluster.yaml").read_text()


def test_the_start_script_has_the_ports() -> None:
    script = (ROOT / "cluster" / "start.sh").read_text()
    assert f"port=${{PORT:-{PORT}}}\n" in script
    assert f"--dashboard-host {HOST} --dashboard-port {DASHBOARD_PORT} " in script
