"""Every kind of reply, chunk and error, made by a real replica behind the real routes, is as `/openapi.json` says.

The replica is in this process; between it and the routes is only what Serve's handle does for them.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
import torch
from fastapi.testclient import TestClient
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from ray.exceptions import ActorDiedError

from roentgen.linear_probe import ProbeCard, SavedProbe, save_probes
from serve_app.config import ModelChoice, ServerConfig
from serve_app.http.ingress import Ingress
from serve_app.replica.model_replica import ModelReplica
from tests.serve_app import tiny
from tests.serve_app.replica.test_model_replica import SUM

TEMPLATE = (
    "{% if short %}?{% else %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]{% endif %}"
    "{% if think %}<think>{% endif %}"
)


EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
LOST = "whose replica is lost"


class PromptRequest:
    """What asking a replica returns: awaited, or iterated."""

    def __init__(self, coming: Any, *, lost: bool = False) -> None:
        self._coming = coming
        self._lost = lost  # after its first piece
        self._begun = False

    def __await__(self) -> Any:
        return self._coming.__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._lost and self._begun:
            raise ActorDiedError
        self._begun = True
        return await anext(self._coming)

    def cancel(self) -> None:
        if hasattr(self._coming, "aclose"):
            self._closed = asyncio.ensure_future(self._coming.aclose())

    async def results_async(self, **options: Any) -> list[Any]:
        return [await self._coming]


class Handle:
    """A handle to the one replica in this process."""

    def __init__(self, replica: ModelReplica, method: str = "") -> None:
        self._replica = replica
        self._method = method

    def __getattr__(self, method: str) -> "Handle":
        return Handle(self._replica, method)

    def options(self, **options: Any) -> "Handle":
        return self

    def remote(self, *arguments: Any) -> PromptRequest:
        lost = getattr(next(iter(arguments), None), "user", None) == LOST
        return PromptRequest(getattr(self._replica, self._method)(*arguments), lost=lost)

    def broadcast(self, method: str) -> PromptRequest:
        return PromptRequest(getattr(self._replica, method)())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    store = tmp_path_factory.mktemp("store")
    tiny.module("llama").save_pretrained(folder)
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    config = ServerConfig(model=str(folder), store=str(store), dtype="float32", threads=1, probes=(str(store),))
    replica = ModelReplica(config)
    replica.reconfigure(config.choice.model_dump())

    def redeploy(choice: ModelChoice) -> None:
        replica.reconfigure(choice.model_dump())

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROENTGEN_API_KEY", raising=False)
        ingress = Ingress(Handle(replica), config, redeploy)
        with TestClient(
            ingress.__serve_build_asgi_app__(), client=("127.0.0.1", 1), raise_server_exceptions=False
        ) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.05)
            (served,) = client.get("/v1/models").json()["data"]
            card = ProbeCard(
                model=served["id"], revision=served["revision"], key="layers.1.resid_post", positions="all",
                kind="logistic", label="digit", target="multiclass", classes=("a", "b", "c"), strength=1, folds=5,
                metrics={}, data_hash="c0ffee", seed=0, roentgen="0.1.0",
            )  # fmt: skip
            torch.manual_seed(0)
            probe = SavedProbe(torch.randn(3, 32), torch.randn(3), torch.zeros(32), torch.ones(32), card)
            save_probes(store / "mine", [probe])
            yield client
    replica.close()


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSE = "/v1/responses"
LOAD = "/v1/models/load"
RUN = "/v1/runs"
SESSION = "/v1/activations/session"
CALLS = {
    "tools": [SUM], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 90, "temperature": 2,
    "chat_template_kwargs": {"short": True},
}  # fmt: skip
CALLED = {
    "tools": [{"type": "function", **SUM["function"]}], "parallel_tool_calls": False, "max_output_tokens": 90, "temperature": 2,
    "chat_template_kwargs": {"short": True},
}  # fmt: skip
YES = {"enum": ["yes"]}
INLINE = {"name": "mine", "key": "layers.1.resid_post", "weight": [0.25] * 32}
OVERFLOW = {"vector": [1e38] * 32, "layer": 1, "scale": 3}
KEPT = {"session_id": "s", "layers": [1], "hook_points": ["resid_post"]}
OLDER = {"layers": [0, 2], "hook_points": ["input_layernorm.output"]}

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (CHAT, {}),
    "n": (CHAT, {"n": 3}),
    "top": (CHAT, {"logprobs": True, "top_logprobs": 3, "n": 2}),
    "thought": (CHAT, {"chat_template_kwargs": {"think": True}}),
    "called": (CHAT, CALLS),
    "called by name": (CHAT, {**CALLS, "tool_choice": {"type": "function", "function": {"name": "add"}}, "n": 2}),
    "shaped": (CHAT, {"response_format": {"type": "json_object"}, "max_tokens": 20}),
    "usage": (CHAT, {"stream_options": {"include_usage": True}}),
    "scored": (CHAT, {"probes": [INLINE, "mine/layers.1.resid_post@all"], "n": 2, "logprobs": True}),
    "steered": (CHAT, {"steering": [{**OVERFLOW, "vector": [0.1] * 32}], "activations": KEPT}),
    "kept": (CHAT, {"activations": KEPT, "stream_options": {"include_usage": True}}),
    "kept n": (CHAT, {"activations": {**KEPT, "labels": {"a": 1}}, "n": 2}),
    "kept sample": (CHAT, {"activations": {**KEPT, "return": "sample"}}),
    "kept full": (CHAT, {"activations": {**KEPT, "return": "full", "positions": "last"}}),
    "kept pooled": (CHAT, {"activations": {**KEPT, "return": "full", "positions": "mean_prompt"}}),
    "kept of a problem": (CHAT, {"activations": {**KEPT, "key": {"config_hash": "c", "problem_id": "p", "epoch": 1}}}),
    "older": (CHAT, {"collect_activations": {**OLDER, "return_activations": True}}),
    "older reference": (CHAT, {"collect_activations": {**OLDER, "return_activations": False}, "n": 2}),
    "text": (TEXT, {"prompt": "ab"}),
    "text n": (TEXT, {"prompt": ["ab", "cde"], "n": 2, "stream_options": {"include_usage": True}}),
    "text chosen": (TEXT, {"prompt": "ab", "logprobs": 0}),
    "text top": (TEXT, {"prompt": "ab", "logprobs": 3, "temperature": 2, "n": 2}),
    "text echo": (TEXT, {"prompt": "ab", "echo": True, "n": 2}),
    "text echo top": (TEXT, {"prompt": "ab", "echo": True, "logprobs": 2}),
    "text read": (TEXT, {"prompt": "ab", "echo": True, "logprobs": 2, "max_tokens": 0}),
    "text ended": (TEXT, {"prompt": "ab", "logit_bias": {"256": 100}, "logprobs": 1}),
    "text scored": (TEXT, {"prompt": "ab", "probes": [INLINE, "mine/layers.1.resid_post@all"]}),
    "text kept": (TEXT, {"prompt": "ab", "activations": {**KEPT, "return": "sample"}}),
    "tokens": (CHAT, {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True, "n": 2}),
    "counted on": (CHAT, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}),
    "continued": (
        CHAT,
        {
            "continue_final_message": True,
            "echo": True,
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}],
        },
    ),
    "prompt scored": (CHAT, {"prompt_logprobs": 2}),
    "stopped": (CHAT, {"stop_token_ids": [70], "logit_bias": {"70": 100}, "include_stop_str_in_output": True}),
    "text tokens": (TEXT, {"prompt": ["ab", "c"], "return_token_ids": True, "logprobs": 1, "echo": True}),
    "text prompt scored": (TEXT, {"prompt": ["ab", "c"], "prompt_logprobs": 0, "truncate_prompt_tokens": 1}),
    "text chosen from": (TEXT, {"prompt": "ab", "structured_outputs": {"choice": ["a", "b"]}}),
    "text named": (TEXT, {"prompt": "ab", "logprobs": 1, "logprob_token_ids": [5], "allowed_token_ids": [7]}),
    "text kept n": (TEXT, {"prompt": ["ab", "c"], "collect_activations": OLDER}),
    "response": (RESPONSE, {"metadata": {"a": "b"}, "instructions": "Be brief."}),
    "response ended": (RESPONSE, {"logit_bias": {"256": 100}}),
    "response top": (RESPONSE, {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
    "response thought": (
        RESPONSE,
        {"chat_template_kwargs": {"think": True}, "reasoning": {"effort": "none", "summary": "auto"}},
    ),
    "response called": (RESPONSE, {**CALLED, "tool_choice": "required"}),
    "response called by name": (RESPONSE, {**CALLED, "tool_choice": {"type": "function", "name": "add"}}),
    "response of a shape": (RESPONSE, {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 20}),
    "response of a schema": (RESPONSE, {"text": {"format": {"type": "json_schema", "name": "x", "schema": YES}}}),
    "response scored": (RESPONSE, {"probes": [INLINE, "mine/layers.1.resid_post@all"]}),
    "response tokens": (RESPONSE, {"return_token_ids": True, "truncation": "auto", "stop": ["e"]}),
    "response kept": (RESPONSE, {"activations": {**KEPT, "return": "sample"}}),
    # Errors.
    "response lost": (RESPONSE, {"user": LOST}),
    "response too long": (RESPONSE, {"max_output_tokens": 500}),
    "response later": (RESPONSE, {"steering": [{**OVERFLOW, "positions": "generated"}] * 2, "max_output_tokens": 9}),
    "response without model": (RESPONSE, {"model": "other"}),
    "response to none": (RESPONSE, {"previous_response_id": "resp_1"}),
    "lost": (CHAT, {"user": LOST}),
    "lost text": (TEXT, {"prompt": "ab", "user": LOST}),
    "overflow": (CHAT, {"steering": [OVERFLOW] * 2}),
    "overflow later": (CHAT, {"steering": [{**OVERFLOW, "positions": "generated"}] * 2, "max_tokens": 9}),
    "too long": (CHAT, {"max_tokens": 500}),
    "unknown": (CHAT, {"unknown": 1}),
    "no layer": (CHAT, {"activations": {"layers": [7]}}),
    "no token": (TEXT, {"prompt": [999]}),
    "no model": (CHAT, {"model": "other"}),
    "no probe": (CHAT, {"probes": ["mine/none"]}),
    "endless": (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    ),
}
OTHERS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/tokenize", {"prompt": "é!"}),
    ("POST", "/tokenize", {"prompt": "é!", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/tokenize", {}),
    ("POST", "/detokenize", {"tokens": [1, 70]}),
    ("POST", "/detokenize", {"tokens": [999]}),
    ("GET", "/tokenizer_info", None),
    ("GET", "/health", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/{id}", None),
    ("GET", "/v1/models/other", None),
    ("GET", "/v1/model/structure", None),
    ("POST", LOAD, {}),
    ("POST", LOAD, {"savepoints": [{"name": "a", "selector": "model.layers[0].mlp"}]}),
    ("POST", LOAD, {"savepoints": [{"name": "a", "selector": "model.layers[0].none"}]}),
    ("POST", LOAD, {"model_id": "other"}),
    ("GET", "/v1/activations/sessions", None),
    ("GET", f"{SESSION}/s", None),
    ("GET", f"{SESSION}/s?offset=1&limit=2", None),
    ("GET", f"{SESSION}/none", None),
    ("POST", RUN, {"id": "mine", "activations": KEPT, "defaults": {"temperature": 0}}),
    ("POST", RUN, {"id": "mine"}),
    ("POST", RUN, {"id": "..."}),
    ("GET", RUN, None),
    ("GET", f"{RUN}/mine", None),
    ("GET", f"{RUN}/none", None),
    ("GET", f"{SESSION}/s/files", None),
    ("GET", f"{SESSION}/s/files/none", None),
    ("DELETE", f"{SESSION}/a b", None),
    ("DELETE", f"{SESSION}/s", None),
    ("DELETE", f"{SESSION}/s", None),
]


MAPS = {
    "added_tokens_decoder", "hook_points", "labels", "metadata", "missing", "prompt_logprobs", "savepoints", "tensors",
    "top_logprobs",
}  # fmt: skip
"""Objects whose keys are data."""
FREE = {"checks", "hook_point_layers", "parameters", "schema", "settings"}
"""Objects that may hold anything."""
MAY_BE_ABSENT = {
    "activations", "content", "data", "format", "id", "name", "probes", "prompt_token_ids", "reasoning_content", "role",
    "sample_info", "stop_reason", "token_ids", "tool_calls", "type", "usage",
}  # fmt: skip


class Document:
    """What `/openapi.json` says."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content
        self._validators: dict[str, jsonschema.protocols.Validator] = {}

    def fits(self, schema: dict[str, Any], value: Any) -> bool:
        name = str(schema)
        if name not in self._validators:
            whole = {**schema, "components": self._content["components"]}
            self._validators[name] = jsonschema.Draft202012Validator(whole)
        return bool(self._validators[name].is_valid(value))

    def bodies(self, reply: httpx2.Response) -> Iterator[tuple[dict[str, Any], Any]]:
        """Take a reply apart, a stream into its chunks, and give each with its schema."""
        path, kind = reply.request.url.path, reply.headers["content-type"].partition(";")[0]
        documented = next(
            methods[reply.request.method.lower()]["responses"][str(reply.status_code)]
            for known, methods in self._content["paths"].items()
            if reply.request.method.lower() in methods and re.fullmatch(re.sub(r"{\w+}", "[^/]+", known), path)
        )
        schema = documented["content"][kind]["schema"]
        if kind == "application/json":
            yield schema, reply.json()
            return
        *events, rest = reply.text.split("\n\n")
        assert rest == ""
        if "event" in schema["properties"]:
            for event in events:
                name, _, data = event.removeprefix("event: ").partition("\ndata: ")
                body = json.loads(data)
                assert body["type"] == name
                yield schema["properties"]["data"]["contentSchema"], body
            return
        chunk, end = schema["properties"]["data"]["anyOf"]
        assert events.pop() == f"data: {end['const']}"
        for event in events:
            yield chunk["contentSchema"], json.loads(event.removeprefix("data: "))


@pytest.fixture(scope="module")
def document(client: TestClient) -> Document:
    return Document(client.get("/openapi.json").json())


@pytest.fixture(scope="module")
def bodies(client: TestClient, folder: Path, document: Document) -> list[tuple[str, dict[str, Any], Any]]:
    """All that is sent: which request it answers, its schema, and what it is."""
    (served,) = client.get("/v1/models").json()["data"]
    found = []
    for name, (path, asked) in ASKED.items():
        for stream in (False, True):
            limit = "max_output_tokens" if path == RESPONSE else "max_tokens"
            body = {"model": served["id"], "seed": 1, limit: 6, "stream": stream, **asked}
            if path == RESPONSE:
                body["input"] = "hi"
            if path == CHAT:
                body = {"messages": [{"role": "user", "content": "hi"}], **body}
            if not stream:
                body.pop("stream_options", None)
            found += [(f"{name}, {stream=}", *sent) for sent in document.bodies(client.post(path, json=body))]
    for method, path, asked in OTHERS:
        named = {"model_id": str(folder)} if path == LOAD else {} if path == RUN else {"model": served["id"]}
        reply = client.request(method, path.format(**served), json=None if asked is None else {**named, **asked})
        found += [(f"{method} {path} {asked}", *sent) for sent in document.bodies(reply)]
    return found


def test_every_reply_and_every_chunk_is_as_documented(document: Document, bodies: list[tuple[str, Any, Any]]) -> None:
    assert [(name, value) for name, schema, value in bodies if not document.fits(schema, value)] == []
    in_streams = {name for name, schema, value in bodies if "error" in value and "anyOf" in schema}
    assert {"lost, stream=True", "lost text, stream=True"} <= in_streams


def test_strings_are_documented_with_their_patterns(client: TestClient) -> None:
    content = client.get("/openapi.json").json()
    (path, *_) = content["paths"][f"{SESSION}/{{session_id}}"]["get"]["parameters"]
    kept = content["components"]["schemas"]["ActivationRequest"]["properties"]
    session = kept["session_id"]["anyOf"][0]["pattern"]
    assert path["schema"]["pattern"] == session
    steered = content["components"]["schemas"]["SteeringRequest"]["properties"]["positions"]["pattern"]
    for pattern, good, bad in (
        (session, ["a", "a.b-c_9"], [".a", "a b", "", "a" * 65]),
        (kept["positions"]["pattern"], ["all", "stride:3", "mean_prompt"], ["stride:", "every", "last "]),
        (steered, ["all", "stride:3"], ["last", "mean_prompt"]),
    ):
        assert [text for text in good if not re.search(pattern, text)] == []
        assert [text for text in bad if re.search(pattern, text)] == []


def test_a_key_too_many_or_too_few_is_not_as_documented(document: Document, bodies: list[tuple[str, Any, Any]]) -> None:
    """The control: of every kind of body, every object is closed, and only what may be absent may be."""
    kinds = {(str(schema), *sorted(set(keys(value)))): (schema, value) for _, schema, value in bodies}
    passed = {key for schema, value in kinds.values() for key, one in changed(value) if document.fits(schema, one)}
    assert passed == MAY_BE_ABSENT
    assert len(kinds) > 40


def test_responses_are_what_the_openai_sdk_expects(bodies: list[tuple[str, Any, Any]]) -> None:
    """Each validated by the SDK's own types, and the events of each stream in the order of its protocol."""
    streams: dict[str, list[Any]] = {}
    whole = 0
    for name, _, body in bodies:
        if name.startswith("response") and "type" in body:
            EVENT.validate_python(body)
            streams.setdefault(name, []).append(body)
        elif name.startswith("response") and "error" in body and body["error"] is None:
            Response.model_validate(body)
            whole += 1
    assert whole >= 10
    for events in streams.values():
        assert [event["sequence_number"] for event in events] == [*range(len(events))]
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] in ("response.completed", "response.incomplete", "response.failed")
        final = events[-1]["response"]
        if final["status"] == "failed":
            continue
        assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == final["output"]
        for index, item in enumerate(final["output"]):
            own = [event for event in events if event.get("output_index") == index]
            deltas = [event for event in own if event["type"].endswith("delta")]
            said = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            assert "".join(event["delta"] for event in deltas) == said
            if item["type"] == "message":
                assert own[1]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                assert [token for event in deltas for token in event["logprobs"]] == item["content"][0]["logprobs"]
            assert own[0]["item"]["id"] == item["id"]
            assert {event["item_id"] for event in own if "item_id" in event} == {item["id"]}
        scores = [event["probes"] for event in events if "probes" in event]
        for place, probe in enumerate(final.get("probes", [])):
            carried = [score for probes in scores for score in probes[place]["scores"]]
            assert carried == probe["scores"][: len(carried)]
            assert len(carried) >= probe["n_prompt"]
    assert {event["type"] for events in streams.values() for event in events} == {
        "error", "response.completed", "response.content_part.added", "response.content_part.done", "response.created",
        "response.failed", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.in_progress", "response.incomplete", "response.output_item.added", "response.output_item.done",
        "response.output_text.delta", "response.output_text.done", "response.reasoning_text.delta",
        "response.reasoning_text.done",
    }  # fmt: skip


def test_a_streamed_response_says_the_same_as_a_whole_one(bodies: list[tuple[str, Any, Any]]) -> None:
    found = {name: body.get("response", body) for name, _, body in bodies if name.startswith("response")}
    for name, whole in found.items():
        if name.endswith("stream=False") and whole.get("object") == "response" and "lost" not in name:
            streamed = found[name.replace("False", "True")]
            assert steady(streamed) == steady(whole), name


def steady(value: Any) -> Any:
    """Leave out what differs from one reply to the next: ids, times, where rows are, and what was found in the cache."""
    if isinstance(value, list):
        return [steady(one) for one in value]
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-4)
    if not isinstance(value, dict):
        return value
    left_out = (
        "id",
        "call_id",
        "created_at",
        "completed_at",
        "rollout_id",
        "shard",
        "stored_path",
        "row_start",
        "row_stop",
        "input_tokens_details",  # the second finds in the cache what the first has read
    )
    return {key: steady(one) for key, one in value.items() if key not in left_out}


def keys(value: Any) -> Iterator[str]:
    """Yield the keys of all objects in a JSON value."""
    for one in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from keys(one)
    if isinstance(value, dict):
        yield from value


def changed(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a JSON value as often as one of its objects can have a key too few, and which, or one too many."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        yield from ((key, [one, *value[1:]]) for key, one in changed(value[0], name))
    elif isinstance(value, dict) and name not in FREE:
        yield "one too many", {**value, "one too many": [0.5]}
        for key, inner in value.items():
            if name not in MAPS:
                yield key, {other: value[other] for other in value if other != key}
            yield from ((deeper, {**value, key: one}) for deeper, one in changed(inner, key))
