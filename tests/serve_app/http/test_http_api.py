"""What surrounds every route: limits, ids, logs and counts, and errors in the envelope."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from ray.exceptions import ActorDiedError, TaskCancelledError
from starlette.types import Message

from serve_app.engines.protocol import Load
from serve_app.http.http_api import auth_dependencies, check_key, make_api
from serve_app.http.metrics import Metrics
from serve_app.logs import JsonFormatter
from serve_app.openai_api.errors import ApiError
from serve_app.requests.stats import ChoiceStats, RequestStats

HERE = ("127.0.0.1", 50_000)


class Text(BaseModel):
    text: str


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def api(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.delenv("ROENTGEN_API_KEY", raising=False)
    api = make_api(1000, metrics)

    @api.post("/echo")
    async def echo(request: Request, body: Text) -> dict[str, str]:
        request.state.stats = RequestStats(3, "s", (ChoiceStats(5, 0.1, 0.2, 1.0, 640, 0.05),))
        return {"text": body.text}

    @api.get("/busy")
    async def busy() -> None:
        raise ApiError(429, "later", code="busy", retry_after_s=2)

    @api.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("secret")

    return api


@pytest.fixture
def client(api: FastAPI) -> Iterator[TestClient]:
    with TestClient(api, client=HERE, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_413(client: TestClient, chunked: bool) -> None:
    body = json.dumps({"text": "x" * 2000}).encode()
    pieces = iter([body[i : i + 100] for i in range(0, len(body), 100)])
    reply = client.post("/echo", content=pieces if chunked else body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "invalid_request_error")
    assert "larger than 1000 bytes" in reply.json()["error"]["message"]


def test_an_error_is_in_the_envelope_and_says_when_to_come_back(client: TestClient) -> None:
    reply = client.get("/busy")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
    assert reply.json()["error"]["type"] == "rate_limit_error"


def test_a_bug_is_500_and_says_nothing_of_the_inside(client: TestClient) -> None:
    reply = client.get("/bug")
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in reply.text


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"text": "\\ud83d"}', "text", "an unpaired surrogate"),
        (b'{"text": "a", "text": "b"}', "text", "duplicate key"),
        (b'{"text": NaN}', "text", "NaN"),
        (b'{"text": "\xff"}', None, "not UTF-8"),
        (b"[]", None, "not a JSON object"),
        (b'"text"', None, "not a JSON object"),
        (b"null", None, "not a JSON object"),
        (b"", None, "empty"),
        (b"{", None, "not JSON"),
    ],
)
def test_a_body_is_read_strictly_on_every_route(client: TestClient, body: bytes, param: str | None, words: str) -> None:
    reply = client.post("/echo", content=body, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], words in error["message"]) == (400, param, True), error


@pytest.mark.parametrize(
    "kind", ["text/plain", "\xff", ";;;", "application/", "multipart/form-data", "application/json\xff"]
)
def test_a_body_of_another_type_is_no_json(client: TestClient, kind: str) -> None:
    reply = client.post("/echo", content=b'{"text": "a"}', headers={"content-type": kind.encode("latin-1")})
    assert (reply.status_code, "Content-Type: application/json" in reply.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("name", ["x-request-id", "authorization", "traceparent", "cookie", "accept"])
@pytest.mark.parametrize("value", [b"\xff\xfe", b"Bearer \xe9", b"a" * 5000, b""])
def test_headers_may_hold_any_bytes(client: TestClient, name: str, value: bytes) -> None:
    reply = client.post("/echo", json={"text": "a"}, headers={name: value})
    assert reply.status_code == 200


@pytest.mark.parametrize(("given", "status"), [("ключ".encode(), 200), (b"\xff\xfe", 401), ("ключ ".encode(), 200)])
def test_a_key_may_have_any_characters(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch, given: bytes, status: int
) -> None:
    monkeypatch.setenv("ROENTGEN_API_KEY", "ключ")
    api = make_api(1000, metrics)
    api.add_api_route("/here", lambda: {"here": True}, dependencies=[Depends(check_key)])
    reply = TestClient(api).get("/here", headers={"authorization": b"Bearer " + given})
    assert reply.status_code == status


HERE_AGAIN: Message = {"type": "http.request", "body": b'{"text": "a"}', "more_body": False}
HALF_A_BODY: Message = {"type": "http.request", "body": b'{"text', "more_body": True}
GONE: Message = {"type": "http.disconnect"}


async def exchange(api: FastAPI, path: str, *arrives: Message | Exception, method: str = "POST") -> list[Message]:
    """Have an application serve one request as Serve does; what arrives ends with the last, again and again."""
    coming, sent = list(arrives), list[Message]()

    async def receive() -> Message:
        await asyncio.sleep(0)
        one = coming.pop(0) if len(coming) > 1 else coming[0]
        if isinstance(one, Exception):
            raise one
        return one

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "client": HERE, "server": ("x", 80), "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    await api(scope, receive, send)
    return sent


@pytest.mark.parametrize("gone", [GONE, TaskCancelledError(), ActorDiedError()])
async def test_a_client_that_leaves_before_its_body_is_whole_is_499(
    api: FastAPI, metrics: Metrics, gone: Message | Exception
) -> None:
    await exchange(api, "/echo", HALF_A_BODY, gone)
    assert counted(metrics, "/echo") == {"499": 1}


@pytest.mark.parametrize("gone", [GONE, TaskCancelledError(), ActorDiedError()])
@pytest.mark.parametrize("path", ["/stream", "/late"])
async def test_a_client_that_leaves_a_stream_is_no_failure(
    api: FastAPI, metrics: Metrics, gone: Message | Exception, path: str
) -> None:
    """Serve's own way of hearing from the client is cancelled when the client leaves, and raises so."""

    async def forever() -> AsyncIterator[str]:
        while True:
            yield "piece"
            await asyncio.sleep(0.001)

    async def late() -> AsyncIterator[str]:
        await asyncio.sleep(3600)
        yield "never"

    api.add_api_route("/stream", lambda: StreamingResponse(forever()), methods=["POST"])
    api.add_api_route("/late", lambda: StreamingResponse(late()), methods=["POST"])
    await asyncio.wait_for(exchange(api, path, HERE_AGAIN, gone), 10)
    assert set(counted(metrics, path)) <= {"200", "499"}


async def test_a_client_that_leaves_while_it_is_answered_is_499(api: FastAPI, metrics: Metrics) -> None:
    started = asyncio.Event()

    async def slow() -> None:
        started.set()
        await asyncio.sleep(3600)

    api.add_api_route("/slow", slow, methods=["POST"])
    serving = asyncio.create_task(exchange(api, "/slow", HERE_AGAIN))
    await started.wait()
    serving.cancel()  # as Serve does
    await asyncio.wait({serving})
    assert counted(metrics, "/slow") == {"499": 1}


def counted(metrics: Metrics, route: str) -> dict[str, float]:
    found = re.findall(
        rf'roentgen_requests_total{{method="POST",route="{route}",status="(\d+)"}} (\S+)', metrics.text({}).decode()
    )
    return {status: float(count) for status, count in found}


def test_no_page_of_another_origin_may_read_it(client: TestClient) -> None:
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for reply in (client.post("/echo", json={"text": ""}, headers=headers), client.options("/echo", headers=headers)):
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (("https://app.example",), "https://app.example", "https://app.example"),
        (("https://app.example",), "https://elsewhere.example", None),
        (("*",), "https://elsewhere.example", "*"),
    ],
)
def test_pages_of_the_origins_that_are_named_may_use_it(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch, origins: tuple[str, ...], origin: str, allowed: str | None
) -> None:
    monkeypatch.setenv("ROENTGEN_API_KEY", "k")
    api = make_api(1000, metrics, origins)
    api.add_api_route("/here", lambda: {"here": True}, dependencies=[Depends(check_key)], methods=["POST"])
    client = TestClient(api)
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-lang",
    }
    preflight = client.options("/here", headers={"Origin": origin, **asked})
    assert preflight.status_code == (200 if allowed else 400)
    assert preflight.headers.get("access-control-allow-origin") == allowed
    if allowed:
        assert "authorization" in preflight.headers["access-control-allow-headers"]
    for key, status in (("k", 200), ("wrong", 401)):  # a page reads errors, too
        reply = client.post("/here", headers={"Origin": origin, "Authorization": f"Bearer {key}"})
        assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (status, allowed)


def test_head_has_the_headers_of_get_and_no_body(client: TestClient, metrics: Metrics) -> None:
    whole, head = client.get("/busy"), client.head("/busy")
    assert (head.status_code, head.text) == (429, "")
    assert head.headers == whole.headers
    assert 'method="HEAD",route="/busy",status="429"} 1.0' in metrics.text({}).decode()


async def test_head_does_not_make_what_it_does_not_send(api: FastAPI) -> None:
    made: list[int] = []

    async def archive() -> AsyncIterator[str]:
        for number in range(1000):
            made.append(number)
            yield "piece"
            await asyncio.sleep(0.001)

    api.add_api_route("/archive", lambda: StreamingResponse(archive(), headers={"Content-Length": "5000"}))
    start, body = await asyncio.wait_for(exchange(api, "/archive", HERE_AGAIN, method="HEAD"), 10)
    assert (start["status"], dict(start["headers"])[b"content-length"], body["body"]) == (200, b"5000", b"")
    assert len(made) < 100


def test_a_405_says_every_method_of_its_path(client: TestClient, api: FastAPI) -> None:
    api.add_api_route("/thing/{name}", lambda name: name, methods=["GET"])
    api.add_api_route("/thing/{name}", lambda name: name, methods=["DELETE"])
    api.add_api_route("/thing/new", lambda: "", methods=["POST"])
    for method, path, allowed in (
        ("PUT", "/thing/a", "DELETE, GET, HEAD"),
        ("PUT", "/thing/new", "DELETE, GET, HEAD, POST"),
        ("GET", "/echo", "POST"),
        ("HEAD", "/echo", "POST"),
    ):
        reply = client.request(method, path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
        assert method == "HEAD" or reply.json()["error"]["message"].startswith(f"{method} {path}")


@pytest.mark.parametrize("key", [None, "k"])
def test_without_a_key_only_this_machine_is_answered(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setenv("ROENTGEN_API_KEY", key or "")
    api = make_api(1000, metrics)
    api.add_api_route("/here", lambda: {"here": True})
    for address, allowed in (("127.0.0.1", True), ("::1", True), ("10.0.0.7", False), ("fe80::1", False)):
        reply = TestClient(api, client=(address, 1)).get("/here")
        assert reply.status_code == (200 if allowed or key else 403), address
        if reply.status_code == 403:
            assert reply.json()["error"]["code"] == "no_api_key_configured"


def test_a_request_is_one_line_of_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[dict[str, Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    logger, handler = logging.getLogger("serve_app.http.middleware"), Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        client.post("/echo", json={"text": "a"}, headers={"X-Request-Id": "mine"})
        client.post("/echo", json={"text": "a"}, headers={"X-Request-Id": ""})
        client.get("/busy")
    finally:
        logger.removeHandler(handler)
    whole, named, busy = lines
    assert whole["request_id"] == "mine"
    assert (whole["route"], whole["status"], whole["whole"]) == ("/echo", 200, True)
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["ttft_s"], whole["session"]) == (3, 5, 0.2, "s")
    assert named["request_id"].startswith("req-")
    assert (busy["status"], busy["error_code"]) == (429, "busy")


def test_requests_are_counted_by_route_and_status(client: TestClient, metrics: Metrics) -> None:
    client.post("/echo", json={"text": "a"})
    client.get("/nowhere")
    text = metrics.text({}).decode()
    for line in (
        'roentgen_requests_total{method="POST",route="/echo",status="200"} 1.0',
        'roentgen_requests_total{method="GET",route="none",status="404"} 1.0',
        "roentgen_requests_in_flight 0.0",
        "roentgen_prompt_tokens_total 3.0",
        "roentgen_completion_tokens_total 5.0",
        "roentgen_capture_bytes_total 640.0",
        "roentgen_time_to_first_token_seconds_sum 0.2",
        "roentgen_inter_token_seconds_sum 0.2",
        "roentgen_commit_seconds_sum 0.05",
    ):
        assert line in text


def test_what_the_engines_did_is_told_by_replica(metrics: Metrics) -> None:
    text = metrics.text({"a": Load(2, 1, {1: 3, 2: 4, 900: 1}, 4096, 64, 7), "b": Load(0, 0)}).decode()
    for line in (
        'roentgen_generations_running{replica="a"} 2.0',
        'roentgen_generations_waiting{replica="a"} 1.0',
        'roentgen_batch_size_bucket{le="1.0",replica="a"} 3.0',
        'roentgen_batch_size_bucket{le="512.0",replica="a"} 7.0',
        'roentgen_batch_size_bucket{le="+Inf",replica="a"} 8.0',
        'roentgen_batch_size_sum{replica="a"} 911.0',
        'roentgen_batch_size_count{replica="b"} 0.0',
        'roentgen_prefix_cache_bytes{replica="a"} 4096.0',
        'roentgen_prefix_cache_hit_tokens_total{replica="a"} 64.0',
        'roentgen_prefix_cache_miss_tokens_total{replica="a"} 7.0',
    ):
        assert line in text
    assert 'replica="a"' not in metrics.text({}).decode()  # a replica that is gone is not told of


def test_the_document_says_whether_a_key_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", "secret"):
        monkeypatch.setenv("ROENTGEN_API_KEY", key)
        api = FastAPI()
        locked = APIRouter(dependencies=auth_dependencies())
        locked.add_api_route("/here", lambda: {"here": True})
        api.include_router(locked)
        document = api.openapi()
        assert ("securitySchemes" in document.get("components", {})) == bool(key)
        assert document["paths"]["/here"]["get"].get("security") == ([{"key": []}] if key else None)
