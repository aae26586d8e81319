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

MODEL = "smollm2-135m"
AT_MOST = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2}
NEVER_SENT = {422}

LIMITS = {
    "temperature": (0, 2),
    "top_p": (0.01, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 9),
}

KEPT = {"session_id": "fuzzed", "layers": [0], "hook_points": ["resid_post"], "positions": "last"}

statuses: Counter[str] = Counter()


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    # JSON knows one kind of number: a whole float is as long as its int, and 29.0 answers take minutes.
    changed = {key: min(body[key], most) for key, most in AT_MOST.items() if type(body.get(key)) in (int, float)}
    generates = context.operation.path.endswith("completions")
    if generates and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        changed["max_tokens"] = 2  # left out, a chat goes on until its context is full
    if isinstance(body.get("model"), str):
        changed["model"] = MODEL
    body = {**body, **changed}
    return _put_right(body) if generates and zlib.crc32(repr(body).encode()) % 2 else body


def _put_right(body: dict[str, Any]) -> dict[str, Any]:
    """Keep of a body what stands alone and is within its limits, and give it something to answer."""
    kept = {key: body[key] for key, (low, high) in LIMITS.items() if type(body.get(key)) in (int, float)
            and low <= body[key] <= high}  # fmt: skip
    kept |= {key: body[key] for key in ("stream", "echo") if isinstance(body.get(key), bool)}
    kept |= {"user": body["user"]} if isinstance(body.get("user"), str) else {}
    kept |= {"model": MODEL, "max_tokens": 2}
    if isinstance(body.get("activations"), dict):
        kept["activations"] = KEPT
    if "messages" in body:
        made = body["messages"] if isinstance(body["messages"], list) else []
        texts = [m["content"] for m in made if isinstance(m, dict) and isinstance(m.get("content"), str)]
        return kept | {"messages": [{"role": "user", "content": text} for text in texts or ["Hello"]]}
    prompt = body.get("prompt")
    return kept | {"prompt": prompt if isinstance(prompt, str) and prompt else "Hello"}


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
