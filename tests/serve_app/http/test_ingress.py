"""The ingress's routes without Serve: what they refuse before a replica is asked, and how they show what is stored."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roentgen import __version__
from roentgen.contract import ActivationRequest
from roentgen.store import StoreWriter
from serve_app.config import ServerConfig
from serve_app.http.ingress import Ingress
from tests.roentgen.store.conftest import RolloutFactory, spoil_labels

HALF = "\ud83d"
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
        {"role": "assistant", "content": "x", "reasoning_content": "r", "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ],
    "stop": ["s"],
    "user": "u",
    "metadata": {"k": "v"},
    "tools": [{"type": "function", "function": FUNCTION}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["e"]}}},
    "chat_template_kwargs": {"k": {"deep": ["v"]}},
    "activations": {
        "session_id": "s",
        "key": {"config_hash": "c", "problem_id": "p"},
        "hook_points": ["resid_post"],
        "positions": "all",
        "labels": {"k": "v"},
    },
    "probes": ["a/b", {"name": "n", "key": "k", "weight": [1.0]}],
    "steering": [{"probe": "a/b", "hook_point": "resid_post", "scale": 1.0}],
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "m", "prompt": ["a", "b"], "stop": "s"},
    "/tokenize": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": CHAT["tools"]},
    "/detokenize": {"model": "m", "tokens": [1]},
    "/v1/models/load": {"model_id": "m", "revision": "r", "savepoints": [{"name": "a", "selector": "layers[0]"}]},
}


class NoReplica:
    """A deployment that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name}: a replica was asked")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def client(store: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROENTGEN_API_KEY", raising=False)
        ingress = Ingress(NoReplica(), ServerConfig(model="m", store=str(store)), lambda choice: None)
        with TestClient(
            ingress.__serve_build_asgi_app__(), client=("127.0.0.1", 1), raise_server_exceptions=False
        ) as client:
            yield client


def post(client: TestClient, path: str, body: Any) -> dict[str, Any]:
    """Send what must be refused; returns the error."""
    reply = client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert reply.status_code in (400, 403), reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the ways to every string of a body."""
    if isinstance(value, str):
        yield way
    elif isinstance(value, dict | list):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*way, step))


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    step, *rest = way
    if isinstance(value, list):
        return [changed(one, tuple(rest), new) if place == step else one for place, one in enumerate(value)]
    return {key: changed(one, tuple(rest), new) if key == step else one for key, one in value.items()}


@pytest.mark.parametrize(("path", "way"), [(path, way) for path, body in BODIES.items() for way in places(body)])
def test_half_a_surrogate_pair_is_refused_in_every_string(client: TestClient, path: str, way: tuple[Any, ...]) -> None:
    error = post(client, path, changed(BODIES[path], way, f"a{HALF}b"))
    assert (error["param"], error["code"]) == (".".join(map(str, way)), "invalid_text")


@pytest.mark.parametrize("path", BODIES)
def test_what_is_nested_too_deep_is_refused_by_name(client: TestClient, path: str) -> None:
    deep: Any = 1
    for number in range(900):
        deep = {"a": deep} if number % 2 else [deep]
    for name in ("chat_template_kwargs", "metadata", "unknown"):
        assert post(client, path, {**BODIES[path], name: deep})["param"] == name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(BODIES)), st.data())
def test_no_body_is_a_5xx(client: TestClient, path: str, data: st.DataObject) -> None:
    """One value is changed into anything, and an unknown field makes sure that no replica is asked."""
    whole = BODIES[path]
    field = data.draw(
        st.sampled_from([*whole, *ActivationRequest.model_fields, "seed", "n", "top_k", "max_tokens", "logit_bias"])
    )
    post(client, path, {**whole, field: data.draw(JSON), "unknown": 1})


def test_a_session_s_page_shows_labels_as_they_were_sent(client: TestClient, store: Path) -> None:
    labels = {
        "sum": 0.1 + 0.2,
        "large": 1e308,
        "max": 2**63 - 1,
        "beyond": 2**70,
        "on": True,
        "one": 1,
        "wide": "\0\U0001f600",
    }
    keyed, plain = RolloutFactory()(problem="p"), RolloutFactory()()
    with StoreWriter(store) as writer:
        writer.submit(dataclasses.replace(keyed, labels=labels, session_id="exact")).result()
        writer.submit(dataclasses.replace(plain, labels={}, session_id="exact")).result()
    reply = client.get("/v1/activations/session/exact")
    first, second = reply.json()["items"]
    assert repr(sorted(first["labels"].items())) == repr(sorted(labels.items()))
    assert (first["problem_id"], first["epoch"], first["turn"], second["epoch"]) == ("p", 1, 0, None)
    assert '"epoch":1,' in reply.text  # and not 1.0


def test_a_session_with_labels_of_an_older_version_is_shown(client: TestClient, store: Path) -> None:
    with StoreWriter(store) as writer:
        writer.submit(RolloutFactory()()).result()
    spoil_labels(store, '{"half": "\\ud83d", "nan": NaN, "inf": -Infinity, "good": 1.5}')
    (item,) = client.get("/v1/activations/session/s").json()["items"]
    assert item["labels"] == {"half": "\ufffd", "nan": None, "inf": None, "good": 1.5}


@pytest.mark.parametrize(
    "query", [f"offset={10**30}", f"offset={2**63 - 1}&limit=10000", "offset=-1", "limit=1e3", "limit=%ff"]
)
def test_any_page_can_be_asked_for(client: TestClient, store: Path, query: str) -> None:
    with StoreWriter(store) as writer:
        writer.submit(dataclasses.replace(RolloutFactory()(), session_id="pages")).result()
    assert client.get(f"/v1/activations/session/pages?{query}").status_code in (200, 400)


@pytest.mark.parametrize("name", ["%ff", "%00", "a%2Fb", "%ed%a0%bd", "..", "x" * 5000, "é", "a b"])
def test_any_session_can_be_asked_for(client: TestClient, name: str) -> None:
    for path in ("", "/files", "/download", "/files/shards%2F%00"):
        assert client.get(f"/v1/activations/session/{name}{path}").status_code in (400, 404)


def test_the_version_is_told(client: TestClient) -> None:
    assert client.get("/version").json() == {"version": __version__}


def test_every_get_route_has_head_and_a_405_says_so(client: TestClient) -> None:
    assert (client.head("/version").status_code, client.head("/v1/activations/sessions").text) == (200, "")
    reply = client.put("/v1/activations/session/s")
    assert (reply.status_code, reply.headers["allow"]) == (405, "DELETE, GET, HEAD")
    assert client.get("/v1/chat/completions").headers["allow"] == "POST"
