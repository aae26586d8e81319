"""`/view` of a server: the page over its store and the runs it was told, behind its keys."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from roentgen.runs import Run
from serve_app.config import ServerConfig
from serve_app.http.ingress import Ingress
from tests.probes.conftest import build_run, planted

__all__ = ["build_run", "planted"]
KEYS = ("layers.1.resid_post",)


@pytest.fixture
def run(
    build_run: Callable[..., Run], planted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    monkeypatch.setenv("ROENTGEN_CACHE", str(tmp_path / "cache"))
    return build_run(*planted(KEYS, KEYS[0], n=4, d=3))


def client_of(run: Run) -> TestClient:
    config = ServerConfig(store=str(run.path / "activations"), view_runs=(str(run.path.parent),))
    ingress = Ingress(None, config, lambda choice: None)
    return TestClient(ingress.__serve_build_asgi_app__(), client=("127.0.0.1", 1), base_url="http://127.0.0.1:8000")


def test_it_shows_the_stores_sessions_and_the_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROENTGEN_API_KEY", raising=False)
    client = client_of(run)
    sources = client.get("/view/api/sources").json()["sources"]
    assert {(source["kind"], source["name"]) for source in sources} == {("run", "run"), ("session", "session")}
    assert client.get("/view", follow_redirects=False).headers["location"].endswith("/view/")
    assert client.get("/view/").status_code == 200
    assert client.post("/view/api/sources").status_code == 405
    assert client.get("/view/api/sources", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/v1/nothing").json()["error"]["message"]  # the server's other errors are still OpenAI's


def test_it_asks_for_the_servers_key(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROENTGEN_API_KEY", "one,two")
    client = client_of(run)
    for url in ("/view/", "/view/api/sources", "/view/api/sources?token=three"):
        assert client.get(url).status_code == 401
    assert client.get("/view/api/sources", headers={"Authorization": "Bearer two"}).status_code == 200
    page = client.get("/view?token=one", headers={"Host": "gpu.example:8000"})
    assert page.status_code == 200
    assert page.url.query == b"token=one"
    assert 'src="./app.js?token=one"' in page.text


def test_a_server_that_nobody_looks_at_has_no_tables() -> None:
    code = "import sys, serve_app.http.ingress; sys.exit('duckdb' in sys.modules or 'roentgen.runs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
