"""Headers before they reach Serve's proxy, and who tells Serve of it."""

import os
from pathlib import Path

import pytest
from ray.serve._private.constants import SERVE_HTTP_REQUEST_ID_HEADER
from ray.serve._private.http_util import RequestIdMiddleware
from ray.serve._private.utils import call_function_from_import_path
from starlette.types import Message, Receive, Scope, Send

from serve_app.http import proxy

Headers = list[tuple[bytes, bytes]]


async def passed_on(headers: Headers) -> tuple[Headers, Headers]:
    """Send a request through what `roentgen serve` puts before Serve's own middleware; returns what arrives and comes back."""
    seen: Headers = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    (outer,) = call_function_from_import_path(proxy.CALLBACK)
    inner = RequestIdMiddleware(app)
    await outer.cls(inner, *outer.args, **outer.kwargs)({"type": "http", "headers": headers}, receive, send)
    return seen, sent[0]["headers"]


@pytest.mark.parametrize(
    ("given", "arrives"),
    [(b"a", b"a"), ("é".encode(), "é".encode()), (b"a\xe9b", "aéb".encode()), (b"\xff\xfe", "ÿþ".encode())],
)
async def test_every_header_can_be_read_as_utf8(given: bytes, arrives: bytes) -> None:
    name = SERVE_HTTP_REQUEST_ID_HEADER.encode()
    seen, back = await passed_on([(name, given), (b"traceparent", given)])
    assert seen == [(name, arrives), (b"traceparent", arrives)]
    assert back == [(b"x-request-id", arrives)]


async def test_an_empty_id_is_replaced() -> None:
    ((name, made),), ((_, back),) = await passed_on([(b"x-request-id", b" ")])
    assert (name, len(made) > 10, back) == (b"x-request-id", True, made)


def test_serve_is_told_in_the_environment_unless_it_is_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(proxy.CALLBACK_VARIABLE, raising=False)
    with proxy.named_in_environment():
        assert os.environ[proxy.CALLBACK_VARIABLE] == proxy.CALLBACK
    assert proxy.CALLBACK_VARIABLE not in os.environ
    monkeypatch.setenv(proxy.CALLBACK_VARIABLE, "mine:own")
    with proxy.named_in_environment():
        assert os.environ[proxy.CALLBACK_VARIABLE] == "mine:own"
    start = Path(__file__).parents[3] / "cluster" / "start.sh"
    assert f"export {proxy.CALLBACK_VARIABLE}={proxy.CALLBACK}\n" in start.read_text()
