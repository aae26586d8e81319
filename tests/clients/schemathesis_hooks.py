"""What schemathesis is told here: keep generation short, and hold the events of streams against the openai SDK's types.

Most made-up requests would end at the model's name; so it, and what makes generation long, are put right wherever a body has
these fields in the right shape. Of the requests that generate, every second one also has put right what depends on other
fields or on the model, which the document cannot say; the others go to the server as they were made.

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

MODEL = "smollm2-135m"
AT_MOST = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2}
NEVER_SENT = {422}

DEPENDENT = {
    *("tools", "tool_choice", "response_format", "stream_options", "top_logprobs", "chat_template_kwargs", "best_of"),
    *("logit_bias", "stop_token_ids", "collect_activations"),
}
"""What the server may refuse because of other fields, or because of what the model is."""

KEPT = {"session_id": "fuzzed", "layers": [0], "hook_points": ["resid_post"], "positions": "last"}

statuses: Counter[str] = Counter()


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    changed = {key: min(body[key], most) for key, most in AT_MOST.items() if type(body.get(key)) is int}
    generates = context.operation.path.endswith("completions")
    if generates and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        changed["max_tokens"] = 2  # left out, a chat goes on until its context is full
    if isinstance(body.get("model"), str):
        changed["model"] = MODEL
    body = {**body, **changed}
    return _put_right(body) if generates and zlib.crc32(repr(body).encode()) % 2 else body


def _put_right(body: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in body.items() if key not in DEPENDENT}
    if body.get("max_tokens") == 0:
        body["max_tokens"] = 1
    if isinstance(body.get("activations"), dict):
        body["activations"] = KEPT
    if isinstance(body.get("messages"), list):
        said = [m["content"] for m in body["messages"] if isinstance(m, dict) and isinstance(m.get("content"), str)]
        body["messages"] = [{"role": "user", "content": text} for text in said or ["Hello"]]
    if isinstance(body.get("prompt"), list):  # of tokens, say, that the model does not have
        body["prompt"] = [str(piece) or "Hello" for piece in body["prompt"]]
    if not body.get("prompt", True):
        body["prompt"] = "Hello"
    return body


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    statuses[f"{case.method} {case.operation.path} {response.status_code}"] += 1


@schemathesis.check
def events_are_openais(context: Any, response: Any, case: Any) -> None:
    """A stream is lines of OpenAI's chunks, or one error in its envelope, and ends with `[DONE]`."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
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


@schemathesis.check
def status_is_one_of_ours(context: Any, response: Any, case: Any) -> None:
    """FastAPI's own 422 never leaves the server."""
    assert response.status_code not in NEVER_SENT, response.text


def write_statuses() -> None:
    Path(os.environ["STATUSES"]).write_text(json.dumps(statuses))


atexit.register(write_statuses)
