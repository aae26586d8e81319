"""Converts a chat's reply to a response and its events.

The chat's own `ChatReply` receives the engine's events and splits the text. Its output becomes items: reasoning, text and calls
follow one another, so only one item is open at a time, and the next one closes it. A whole reply takes the same path in large
pieces, so that a response has the same content whether it is streamed or not.
"""

import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from ulid import ULID

from serve_app.engines.markers import THINK_END
from serve_app.engines.protocol import TextDelta
from serve_app.engines.storage import Done
from serve_app.models.tokenization import token_bytes
from serve_app.openai_api.chat import ChatReply
from serve_app.openai_api.probe_params import format_scores
from serve_app.openai_api.responses import schemas
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.openai_api.responses.scored_text import ScoredText
from serve_app.openai_api.schemas import (
    CaptureFields,
    ChatCompletionChunk,
    ChatDelta,
    ProbeFields,
    ProbeScores,
    ToolCallDelta,
)

Events = list[dict[str, Any]]
"""Events of `schemas.EVENTS`."""


@dataclass
class _OpenItem:
    item: schemas.OutputItem
    place: dict[str, Any]
    """The item's identification in its events."""
    text: str = ""
    start: int = 0
    """Offset of its text in the reply's text."""


class ResponsesReply:
    """Builds the response to one request."""

    def __init__(self, request: ResponsesRequest, chat: ChatReply) -> None:
        """Start a response.

        Args:
            request: the request.
            chat: the chat's reply, which receives the engine's events.
        """
        self._request = request
        self._chat = chat
        self._response = _begun(request, chat.created)
        self._item: _OpenItem | None = None
        self._sent = 0
        self._scored = ScoredText()
        self._probed: list[ProbeScores] = []  # scores that have not been sent yet

    def opening(self) -> Events:
        """Return the first events of a stream."""
        return [self._state("created"), self._state("in_progress")]

    def delta(self, index: int, event: TextDelta) -> Events:
        """Return the events for new text."""
        return [piece for chunk in self._chat.delta(index, event) for piece in self._chunk(chunk)]

    def done(self, index: int, done: Done) -> Events:
        """Return the events that end the last item."""
        pieces = [piece for chunk in self._chat.done(index, done) for piece in self._chunk(chunk)]
        return pieces + self._finish(done)

    def closing(self, kept: CaptureFields) -> Events:
        """Return the last event, with the whole response."""
        self._response = {**self._response, **kept}
        return [self._state(self._response["status"])]

    def whole(self, dones: list[Done], kept: CaptureFields) -> schemas.Response:
        """Return the whole response of a request without streaming."""
        reply = self._chat.whole(dones, {})
        (choice,) = reply["choices"]
        message = choice["message"]
        self._response["prompt_logprobs"] = reply["prompt_logprobs"]
        self._scored.add((choice["logprobs"] or {"content": []})["content"])
        self._add({"reasoning_content": message.get("reasoning_content", "")})
        self._add({"content": message["content"] or ""})
        for number, call in enumerate(message.get("tool_calls", [])):
            self._add({"tool_calls": [{"index": number, "id": call["id"], "function": {**call["function"]}}]})
        self._finish(dones[0])
        return {**self._response, **kept}

    def _chunk(self, chunk: ChatCompletionChunk) -> Events:
        """Convert a chat's chunk to events."""
        pieces: Events = []
        for choice in chunk["choices"]:
            self._scored.add((choice["logprobs"] or {"content": []})["content"])
            self._probed = _joined(self._probed, choice.get("probes", []))
            pieces += self._add(choice["delta"])
        return pieces

    def _add(self, delta: ChatDelta) -> Events:
        if thought := delta.get("reasoning_content"):
            return self._more("reasoning", thought)
        if content := delta.get("content"):
            return self._more("message", content)
        return [piece for call in delta.get("tool_calls", []) for piece in self._call(call)]

    def _more(self, kind: str, text: str) -> Events:
        """Continue the text or the reasoning."""
        pieces: Events = []
        if self._item is None or self._item.item["type"] != kind:
            pieces = self._close("completed") + self._open(_empty(kind))
        assert self._item is not None
        item, self._item.text = self._item, self._item.text + text
        if not text:
            return pieces
        more: dict[str, Any] = {**item.place, "content_index": 0, "delta": text, **self._take_probed()}
        if kind == "reasoning":
            return [*pieces, self._event("response.reasoning_text.delta", more)]
        if len(item.text) == len(text):
            item.start = self._scored.find(text, after=THINK_END)
        scored = self._scored.take(item.start, item.start + len(item.text))
        item.item["content"][0]["logprobs"] += scored  # type: ignore[typeddict-item]
        return [*pieces, self._event("response.output_text.delta", {**more, "logprobs": scored})]

    def _call(self, call: ToolCallDelta) -> Events:
        """Start a call, or continue its arguments."""
        pieces: Events = []
        function = call["function"]
        if "id" in call:
            pieces = self._close("completed") + self._open(
                {
                    "type": "function_call",
                    "id": _named("fc"),
                    "call_id": call["id"],
                    "name": function["name"],
                    "arguments": "",
                    "status": "in_progress",
                }
            )
        assert self._item is not None
        self._item.text += function["arguments"]
        if function["arguments"]:
            more = {**self._item.place, "delta": function["arguments"], **self._take_probed()}
            pieces.append(self._event("response.function_call_arguments.delta", more))
        return pieces

    def _open(self, item: schemas.OutputItem) -> Events:
        """Open an item without text."""
        place = {"item_id": item["id"], "output_index": len(self._response["output"])}
        self._item = _OpenItem(item, place)
        self._response["output"].append(item)
        empty = item if item["type"] == "function_call" else {**item, "content": []}
        added = self._event("response.output_item.added", {"output_index": place["output_index"], "item": {**empty}})
        if item["type"] == "function_call":
            return [added]
        return [added, self._event("response.content_part.added", {**place, **deepcopy(_part(item))})]

    def _close(self, status: schemas.Status) -> Events:
        """Close the open item, if there is one."""
        if self._item is None:
            return []
        item, place, text = self._item.item, self._item.place, self._item.text
        self._item = None
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            all_of_it = {**place, "name": item["name"], "arguments": text}
            pieces = [self._event("response.function_call_arguments.done", all_of_it)]
        else:
            item["content"][0]["text"] = text
            all_of_it = {**place, "content_index": 0, "text": text}
            if item["type"] == "message":
                all_of_it["logprobs"] = item["content"][0]["logprobs"]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            pieces = [
                self._event(f"response.{kind}.done", all_of_it),
                self._event("response.content_part.done", {**place, **_part(item)}),
            ]
        done = {"output_index": place["output_index"], "item": item}
        return [*pieces, self._event("response.output_item.done", done)]

    def _finish(self, done: Done) -> Events:
        """End the reply, and add its status and usage to the response."""
        finished, response = done.finished, self._response
        cut = finished.finish_reason == "length"
        pieces = [] if response["output"] else self._more("message", "")  # an empty reply has an empty message
        pieces += self._close("incomplete" if cut else "completed")
        response["status"] = "incomplete" if cut else "completed"
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["completed_at"] = int(time.time())
        thought = any(item["type"] == "reasoning" for item in response["output"])
        n_thoughts = _count_through(self._chat.tokenizer, finished.token_ids, THINK_END) if thought else 0
        n_prompt, n_written = self._chat.n_prompt, len(finished.token_ids)
        response["usage"] = {
            "input_tokens": n_prompt,
            "input_tokens_details": {"cached_tokens": finished.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": n_written,
            "output_tokens_details": {"reasoning_tokens": n_thoughts},
            "total_tokens": n_prompt + n_written,
        }
        response["stop_reason"] = finished.stop_reason
        if self._request.returns_token_ids:
            response["prompt_token_ids"] = list(self._chat.prompt_token_ids)
            response["token_ids"] = finished.token_ids
        if finished.probed:
            response["probes"] = format_scores(self._chat.probes, finished.probed, n_prompt, acted=finished.acted)
        return pieces

    def _take_probed(self) -> ProbeFields:
        probed, self._probed = self._probed, []
        return {"probes": probed} if probed else {}

    def _state(self, state: str) -> dict[str, Any]:
        return self._event(f"response.{state}", {"response": {**self._response, "output": [*self._response["output"]]}})

    def _event(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return event


def _begun(request: ResponsesRequest, created: int) -> schemas.Response:
    """Return a response without output."""
    choice = request.tool_choice
    return {
        "id": _named("resp"),
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "model": request.model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_logprobs": request.top_logprobs,
        "tools": [tool.model_dump() for tool in request.tools],  # type: ignore[misc]
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),  # type: ignore[typeddict-item]
        "parallel_tool_calls": request.parallel_tool_calls,
        "text": {"format": request.text.format.described(), "verbosity": "medium"},
        "reasoning": {"effort": request.reasoning.effort, "summary": None},
        "truncation": request.truncation,
        "metadata": request.metadata or {},
        "user": request.user,
        "service_tier": "default",
        "previous_response_id": None,
        "store": False,
        "background": False,
        "stop_reason": None,
        "prompt_token_ids": None,
        "token_ids": None,
        "prompt_logprobs": None,
    }


def _empty(kind: str) -> schemas.OutputItem:
    if kind == "reasoning":
        thought: schemas.ReasoningContent = {"type": "reasoning_text", "text": ""}
        return {"type": "reasoning", "id": _named("rs"), "status": "in_progress", "summary": [], "content": [thought]}
    text: schemas.TextContent = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "message", "id": _named("msg"), "role": "assistant", "status": "in_progress", "content": [text]}


def _part(item: schemas.MessageItem | schemas.ReasoningOutput) -> dict[str, Any]:
    return {"content_index": 0, "part": {**item["content"][0]}}


def _named(kind: str) -> str:
    return f"{kind}_{str(ULID()).lower()}"


def _joined(earlier: list[ProbeScores], later: list[ProbeScores]) -> list[ProbeScores]:
    """Concatenate the scores of consecutive rows."""
    if not earlier or not later:
        return earlier or later
    return [{**old, "scores": old["scores"] + new["scores"]} for old, new in zip(earlier, later, strict=True)]  # type: ignore[operator]


def _count_through(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], marker: str) -> int:
    """Return the number of tokens up to the end of a marker; all of them if it is missing."""
    text = b""
    for count, token in enumerate(token_ids, start=1):
        text += token_bytes(tokenizer, token)
        if marker.encode() in text[-len(marker) * 8 :]:
            return count
    return len(token_ids)
