"""The smoke test and the doctor before a real server, and before things that are none."""

import http.server
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from roentgen.serving.doctor import examine_server
from roentgen.serving.local_server import LaunchError, free_port
from roentgen.serving.smoke import ROUTES, smoke
from roentgen.store import list_sessions
from tests.conftest import ROENTGEN, Server


@contextmanager
def serving(answer: Callable[[str, str], tuple[int, Any]]) -> Iterator[str]:
    """An HTTP server that answers a method and a path with a status and JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, said = answer(self.command, self.path)
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


@pytest.fixture
def nginx() -> Iterator[str]:
    """A web server that answers 200 to everything: what the seed's users took for a healthy server."""

    said = {"/health": {"status": "ok", "stage": "fine"}}
    with serving(lambda _, path: (200, said.get(path, {}))) as url:
        yield url


@pytest.mark.integration
def test_a_server_passes_and_keeps_nothing_of_it(server: Server) -> None:
    said: list[str] = []
    report = smoke(server.root, "none", said.append)
    assert report.model == "smollm2-135m"
    assert report.rows > 10
    assert report.tensors == ("layers.0.resid_post", "layers.29.resid_post")
    assert said[-1] == "reading the activations back"
    assert not [one for one in list_sessions(server.store) if one.session_id.startswith("smoke-")]


@pytest.mark.integration
def test_the_commands(server: Server) -> None:
    done = subprocess.run([ROENTGEN, "smoke", server.base_url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rows of layers.0.resid_post, layers.29.resid_post read back" in done.stdout
    done = subprocess.run([ROENTGEN, "doctor", server.base_url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "smollm2-135m" in done.stdout


@pytest.mark.integration
def test_the_doctor_finds_a_server_well(server: Server) -> None:
    findings = examine_server(server.root, "none")
    assert {finding.verdict for finding in findings} == {"fine"}, findings
    assert [finding.what for finding in findings] == ["port", "health", "routes", "model", "store"]


def test_a_server_of_something_else_is_found_out(nginx: str) -> None:
    with pytest.raises(LaunchError, match=r"is not a Roentgen server: /openapi.json lacks /v1/chat/completions"):
        smoke(nginx, "none", lambda _: None)
    wrong = {finding.what for finding in examine_server(nginx, "none") if finding.verdict == "wrong"}
    assert {"routes", "model"} <= wrong


def test_where_nothing_listens_is_said_at_once() -> None:
    port = free_port("127.0.0.1")
    started = time.monotonic()
    with pytest.raises(
        LaunchError, match=rf"no connection to 127\.0\.0\.1:{port} \(Connection refused\): start a server"
    ):
        smoke(f"http://127.0.0.1:{port}", "none", lambda _: None)
    assert time.monotonic() - started < 30  # it used to wait for a minute


def test_another_server_is_not_said_to_be_starting() -> None:
    with (
        serving(lambda method, path: (404, {})) as base,
        pytest.raises(LaunchError, match="is not a Roentgen server: GET /health"),
    ):
        smoke(base, "none", lambda _: None)


def test_what_was_found_first_is_blamed() -> None:
    """A session that is not there cannot be deleted either; that is not what is wrong."""
    tensor = {"shape": [9, 4], "dtype": "torch.float32", "stored_path": "s"}
    kept = {"session_id": "x", "rollout_id": "r", "uri": "/u", "shard": "s", "row_start": 0, "row_stop": 9}
    reply = {
        "choices": [{"message": {"content": "84"}}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 2},
        "activations": {**kept, "tensors": {"layers.0.resid_post": tensor}},
    }

    def answer(method: str, path: str) -> tuple[int, Any]:
        known = {
            "/health": {"status": "ok", "stage": "ready"},
            "/openapi.json": {"paths": dict.fromkeys(ROUTES)},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/v1/chat/completions": reply,
        }
        return (200, known[path]) if path in known else (404, {"error": {"message": f"no {method} {path}"}})

    with serving(answer) as base, pytest.raises(LaunchError) as caught:
        smoke(base, "none", lambda _: None)
    assert "DELETE" not in str(caught.value)
    assert "/v1/activations/session/smoke-" in str(caught.value)


def test_a_wrong_key_is_called_one() -> None:
    def answer(method: str, path: str) -> tuple[int, Any]:
        return (200, {"status": "ok", "stage": "ready"}) if path == "/health" else (401, {"error": {"message": "no"}})

    with (
        serving(answer) as base,
        pytest.raises(LaunchError, match="the API key is missing or wrong; set ROENTGEN_API_KEY"),
    ):
        smoke(base, "none", lambda _: None)


def test_where_nothing_listens_the_doctor_says_so_and_what_to_do() -> None:
    (finding,) = examine_server(f"http://127.0.0.1:{free_port('127.0.0.1')}", "none")
    assert finding.verdict == "wrong"
    assert "no connection to" in finding.text
    assert "open a tunnel" in finding.todo
