"""What is checked before a server is started, and what its health says while it starts."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from roentgen.contract import ActivationRequest
from roentgen.serving.local_server import (
    LaunchError,
    check_host,
    check_port,
    free_port,
    serving,
    taps_for,
    wait_until_ready,
)
from serve_app.config import ServerConfig


@contextmanager
def health(*answers: tuple[int, str]) -> Iterator[str]:
    """An HTTP server that gives these answers, one per request, the last one for ever."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(status: str, stage: str) -> tuple[int, str]:
    return (200 if status == "ok" else 503), json.dumps({"status": status, "stage": stage})


def test_the_stages_of_a_start_are_passed_on_once_each() -> None:
    answers = [(404, "not found"), says("loading", "weights"), says("loading", "weights"), says("ok", "ready")]
    heard: list[str] = []
    with health(*answers) as base:
        wait_until_ready(base, heard.append, timeout_s=20)
    assert heard == ["starting the application", "weights"]


def test_a_model_that_cannot_be_loaded_ends_the_wait_with_its_reason() -> None:
    with health(says("failed", "no such weights")) as base, pytest.raises(LaunchError, match="no such weights"):
        wait_until_ready(base, print, timeout_s=20)


def test_an_answer_that_is_not_ours_ends_the_wait() -> None:
    with health((500, "a stack trace")) as base, pytest.raises(LaunchError, match="answered 500: a stack trace"):
        wait_until_ready(base, print, timeout_s=20)


def test_a_start_that_never_ends_is_given_up_with_its_last_stage() -> None:
    with health(says("loading", "weights")) as base, pytest.raises(LaunchError, match="last stage was: weights"):
        wait_until_ready(base, print, timeout_s=0.5)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--port {port}: Address already in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port("127.0.0.1"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROENTGEN_API_KEY", raising=False)
    check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org"])
def test_any_other_address_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROENTGEN_API_KEY", raising=False)
    with pytest.raises(LaunchError, match="set ROENTGEN_API_KEY, or use"):
        check_host(host)
    monkeypatch.setenv("ROENTGEN_API_KEY", "secret")
    check_host(host)


def test_a_model_that_is_not_there_is_refused_before_ray_starts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", unexpected)
    config = ServerConfig(model=str(tmp_path / "nothing"), store=str(tmp_path / "store"))
    with pytest.raises(LaunchError, match="no such folder"), serving(config, stage=lambda _: None):
        pass


@pytest.mark.parametrize(
    ("layers", "hook_points", "taps"),
    [
        ((0, 2), ("resid_post", "embed"), ("layers.0.resid_post", "layers.2.resid_post", "embed")),
        ((0, -1), ("resid_post",), ("resid_post",)),
        ("all", ("resid_mid", "ln_mlp"), ("resid_mid", "ln_mlp")),
        ((1,), ("mlp.down_proj.input", "resid_pre"), ("mlp.down_proj.input", "layers.1.resid_pre")),
    ],
)
def test_vllm_taps_what_is_going_to_be_captured(layers: object, hook_points: tuple[str, ...], taps: object) -> None:
    assert taps_for(ActivationRequest(layers=layers, hook_points=hook_points)) == taps
