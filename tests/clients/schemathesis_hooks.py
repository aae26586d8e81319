"""What schemathesis is told here: keep generation short, and hold the events of streams against the openai SDK's types.

Most made-up requests would end at the model's name; so it, and what makes generation long, are put right wherever a body has
these fields in the right shape. Of the requests that generate, every second one also has put right what depends on other
fields or on the model, which the document cannot say, and keeps only what stands alone; the others go as they were made.

`SCHEMATHESIS_HOOKS` names this module; it writes how often each route answered with which status to the file in `STATUSES`.
"""

import atexit
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

MODEL = "smollm2-135m"
AT_MOST = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 2}
LIMIT = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
"""The routes that generate, and what limits that there."""
NEVER_SENT = {422}

LIMITS = {
    "temperature": (0, 2),
    "top_p": (0.01, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 9),
}

KEPT = {"session_id": "fuzzed", "layers": [0], "hook_points": ["resid_post"], "positions": "last"}

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)

statuses: Counter[str] = Counter()


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    # JSON knows one kind of number: a whole float is as long as its int, and 29.0 answers take minutes.
    changed = {key: min(body[key], most) for key, most in AT_MOST.items() if type(body.get(key)) in (int, float)}
    limit = LIMIT.get(context.operation.path)
    if limit and body.get(limit) is None and body.get("max_completion_tokens") is None:
        changed[limit] = 2  # left out, a chat goes on until its context is full
    if isinstance(body.get("model"), str):
        changed["model"] = MODEL
    body = {**body, **changed}
    return _put_right(body, limit) if limit and zlib.crc32(repr(body).encode()) % 2 else body


def _put_right(body: dict[str, Any], limit: str) -> dict[str, Any]:
    """Keep of a body what stands alone and is within its limits, and give it something to answer."""
    kept = {key: body[key] for key, (low, high) in LIMITS.items() if type(body.get(key)) in (int, float)
            and low <= body[key] <= high}  # fmt: skip
    kept |= {key: body[key] for key in ("stream", "echo") if isinstance(body.get(key), bool)}
    kept |= {"user": body["user"]} if isinstance(body.get("user"), str) else {}
    kept |= {"model": MODEL, limit: 2}
    if isinstance(body.get("activations"), dict):
        kept["activations"] = KEPT
    if "messages" in body:
        made = body["messages"] if isinstance(body["messages"], list) else []
        texts = [m["content"] for m in made if isinstance(m, dict) and isinstance(m.get("content"), str)]
        return kept | {"messages": [{"role": "user", "content": text} for text in texts or ["Hello"]]}
    if limit == "max_output_tokens":
        given = body.get("input")
        return kept | {"input": given if isinstance(given, str) and given else "Hello"}
    prompt = body.get("prompt")
    return kept | {"prompt": prompt if isinstance(prompt, str) and prompt else "Hello"}


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    statuses[f"{case.method} {case.operation.path} {response.status_code}"] += 1


@schemathesis.check
def events_are_openais(context: Any, response: Any, case: Any) -> None:
    """A stream is lines of OpenAI's chunks, or one error in its envelope, and ends with `[DONE]`; or a response's events."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    if case.operation.path == "/v1/responses":
        _are_of_a_response(response.text)
        return
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", ""), "the stream does not end with [DONE]"
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        if "error" in chunk:
            assert chunk["error"].keys() == {"message", "type", "param", "code"}
            assert chunk["error"]["type"] != "server_error", chunk["error"]
        elif chunk["object"] == "text_completion":
            # OpenAI's type for a piece is the one for a whole, which has always finished.
            choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
            Completion.model_validate({**chunk, "choices": choices})
        else:
            ChatCompletionChunk.model_validate(chunk)


def _are_of_a_response(stream: str) -> None:
    *events, end = stream.split("\n\n")
    assert end == "", "the stream does not end with an event"
    for number, event in enumerate(events):
        name, _, data = event.removeprefix("event: ").partition("\ndata: ")
        found = EVENT.validate_python(json.loads(data))
        assert (found.type, found.sequence_number) == (name, number)
        assert found.type != "error" or found.error["type"] != "server_error", data


@schemathesis.check
def status_is_one_of_ours(context: Any, response: Any, case: Any) -> None:
    """FastAPI's own 422 never leaves the server."""
    assert response.status_code not in NEVER_SENT, response.text


def write_statuses() -> None:
    Path(os.environ["STATUSES"]).write_text(json.dumps(statuses))


atexit.register(write_statuses)
