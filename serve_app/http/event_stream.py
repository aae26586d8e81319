"""Formats a stream's chunks as server-sent events.

A replica sends chunks, an error as a chunk, and at the end the request's statistics, which are kept for the middleware. Events
of chat completions and completions have no name, an error event has OpenAI's envelope, and the last event is `[DONE]`. Events
of a response are named by their type, and the last one carries the final status.
"""

import json
from typing import Any

from starlette.datastructures import State

from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.responses.failure import failure_events
from serve_app.openai_api.responses.request import ResponsesRequest


class EventStream:
    """The events of chat completions and of completions."""

    end = "data: [DONE]\n\n"
    """Text after the last event."""

    def __init__(self, state: State) -> None:
        """Start a stream.

        Args:
            state: the request's state, which the middleware reads.
        """
        self._state = state

    def write(self, chunks: list[dict[str, Any]]) -> str:
        """Format chunks; statistics go into the request's state."""
        written = []
        for chunk in chunks:
            if "stats" in chunk:
                self._state.stats = chunk["stats"]
            elif chunk.keys() == {"error"}:
                written.append(self.fail(ApiError.from_payload(chunk["error"])))
            else:
                written.append(self._event(chunk))
        return "".join(written)

    def fail(self, error: ApiError) -> str:
        """Format an error."""
        self._state.error_code = error.code
        return self._failure(error)

    def _event(self, chunk: dict[str, Any]) -> str:
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _failure(self, error: ApiError) -> str:
        return self._event({**error.body()})


class ResponseEventStream(EventStream):
    """The events of a response."""

    end = ""

    def __init__(self, state: State, request: ResponsesRequest) -> None:
        """Start a stream.

        Args:
            state: the request's state, which the middleware reads.
            request: the request.
        """
        super().__init__(state)
        self._request = request
        self._next = 0
        self._begun: dict[str, Any] = {}

    def _event(self, chunk: dict[str, Any]) -> str:
        self._next = chunk["sequence_number"] + 1
        self._begun = self._begun or chunk["response"]  # the first event has it
        return f"event: {chunk['type']}\n{super()._event(chunk)}"

    def _failure(self, error: ApiError) -> str:
        events = failure_events(self._request.renamed(error), self._next, self._begun)
        return "".join(self._event({**event}) for event in events)
