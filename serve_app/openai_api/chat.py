"""`/v1/chat/completions`: the request, and the reply, whole or streamed.

A `ChatReply` converts the events of one request's choices to OpenAI's objects. Each choice has a `ReplyParser`, which splits
its text into content, reasoning and tool calls, in the same way whether it is streamed or not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from roentgen.contract import Int, MaxTokens
from serve_app.capture.probe_scores import RequestProbe
from serve_app.engines.probe_stopping import Acted
from serve_app.engines.protocol import Finished, TextDelta, TokenScore
from serve_app.engines.storage import Done
from serve_app.openai_api import schemas
from serve_app.openai_api.effort import Effort
from serve_app.openai_api.logprobs import chat_logprobs, prompt_logprobs
from serve_app.openai_api.messages import Message, ResponseFormat, Tool, ToolChoice, callable_names, check_tool_results
from serve_app.openai_api.neutral import NeutralChatParams
from serve_app.openai_api.params import MAX_TOP_LOGPROBS, GenerationParams
from serve_app.openai_api.probe_params import format_scores
from serve_app.openai_api.prompt import Ending
from serve_app.openai_api.reply_parser import (
    ContentDelta,
    ReasoningDelta,
    ReplyParser,
    ReplyPart,
    ToolCallArguments,
    ToolCallStart,
    assemble,
)


class ChatRequest(NeutralChatParams, GenerationParams):
    """The body of a chat completion request (docs/http.md)."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        check_tool_results(self.messages)
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: allowed only with logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice: requires tools")
        named = callable_names(self.tool_choice or "auto") or frozenset()
        if unknown := sorted(named - {tool.function.name for tool in self.tools}):
            raise ValueError(f"tool_choice: there is no tool named {', '.join(map(repr, unknown))}")
        if self.logprob_token_ids and not self.logprobs:
            raise ValueError("logprob_token_ids: allowed only with logprobs: true")
        if self.continue_final_message:
            if self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
                raise ValueError("continue_final_message: requires add_generation_prompt: false")
            if (last := self.messages[-1]).role != "assistant" or last.tool_calls:
                raise ValueError("continue_final_message: the last message must be an assistant's without tool_calls")
        shaped = self.response_format is not None and self.response_format.type != "text"
        if self.structured is not None and (self.calls_tools or shaped):
            other = "tools; set tool_choice to none" if self.calls_tools else "response_format"
            raise ValueError(f"{self.structured[0]}: cannot be combined with {other}")
        if self.ignore_eos and (self.calls_tools or shaped):
            raise ValueError(
                "ignore_eos: not allowed with tools or response_format, which determine where the reply ends"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens to generate, from `max_tokens` or `max_completion_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def ending(self) -> Ending:
        """How the rendered conversation ends."""
        return "open" if self.continue_final_message else "reply" if self.add_generation_prompt else "none"

    @property
    def echoed(self) -> str:
        """The last message's text, if the reply must repeat it (`echo`); else empty."""
        return self.messages[-1].content if self.echo and self.messages[-1].role == "assistant" else ""

    @property
    def calls_tools(self) -> bool:
        """Whether the reply may call tools."""
        return bool(self.tools) and self.tool_choice != "none"


@dataclass
class _ChoiceState:
    parser: ReplyParser
    called: bool = False
    done: Done | None = None
    probed: int = 0  # rows whose scores have been sent
    n_sent: int = 0  # tokens that have been sent


@dataclass
class ChatReply:
    """Builds the reply to one request from the events of its choices."""

    request: ChatRequest
    """The request."""
    request_id: str
    """The reply's id."""
    tokenizer: PreTrainedTokenizerBase
    """The model's tokenizer, to format log-probabilities."""
    reasoning: Literal["started", "possible", "none"]
    """How a choice's text begins (see `ReplyParser`)."""
    n_prompt: int
    """Number of prompt tokens."""
    probes: tuple[RequestProbe, ...] = ()
    """Probes that score the tokens."""
    prompt_token_ids: Sequence[int] = ()
    """Token ids of the prompt."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._choices = [
            _ChoiceState(ReplyParser(tools=self.request.calls_tools, reasoning=self.reasoning))
            for _ in range(self.request.n)
        ]

    def opening(self) -> list[schemas.ChatCompletionChunk]:
        """Return the first chunks of a stream."""
        echoed = self.request.echoed
        chunks = [self._chunk(i, {"role": "assistant", "content": echoed}) for i in range(len(self._choices))]
        if self.request.returns_token_ids:
            chunks[0]["prompt_token_ids"] = list(self.prompt_token_ids)
        return chunks

    def delta(self, index: int, event: TextDelta) -> list[schemas.ChatCompletionChunk]:
        """Return the chunks for a choice's new text."""
        choice = self._choices[index]
        choice.n_sent += len(event.token_ids)
        return self._pieces(index, choice.parser.feed(event.text), event)

    def done(self, index: int, done: Done) -> list[schemas.ChatCompletionChunk]:
        """Return the last chunks of a choice."""
        choice = self._choices[index]
        finished = done.finished
        pieces = self._pieces(index, choice.parser.finish(), None)
        rest, choice.n_sent, choice.done = finished.token_ids[choice.n_sent :], len(finished.token_ids), done
        probed = self._probed(choice, [scores[choice.probed :] for scores in finished.probed], finished.acted)
        last = self._chunk(index, {}, self._finish_reason(choice, finished), probed=probed, tokens=rest)
        last["choices"][0]["stop_reason"] = finished.stop_reason
        return [*pieces, last]

    def closing(self, kept: schemas.CaptureFields) -> list[schemas.ChatCompletionChunk]:
        """Return the chunks after all choices: usage if requested, and activations."""
        counted: schemas.UsageFields = {"usage": self._usage()} if self.request.counts_usage else {}
        return [{**self._enveloped([]), **counted, **kept}] if counted or kept else []

    def whole(self, dones: list[Done], kept: schemas.CaptureFields) -> schemas.ChatCompletion:
        """Return the whole reply of a request without streaming."""
        choices: list[schemas.ChatChoice] = []
        for index, (choice, done) in enumerate(zip(self._choices, dones, strict=True)):
            finished = done.finished
            choice.done = done
            parts = [*choice.parser.feed(finished.text), *choice.parser.finish()]
            choice.called = any(isinstance(part, ToolCallStart) for part in parts)
            spoken = len(finished.token_ids) - (finished.ended_by is not None)
            choice.n_sent = len(finished.token_ids)
            message = assemble(parts)
            if echoed := self.request.echoed:
                message["content"] = echoed + (message["content"] or "")
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(finished.token_ids[:spoken], finished.scores[:spoken]),
                    "finish_reason": self._finish_reason(choice, finished),
                    "stop_reason": finished.stop_reason,
                    "token_ids": finished.token_ids if self.request.returns_token_ids else None,
                    **self._probed(choice, finished.probed, finished.acted),
                }
            )
        scores, top = dones[0].finished.prompt_scores, self.request.prompt_logprobs
        scored = None
        if scores is not None and top is not None:
            scored = prompt_logprobs(self.tokenizer, self.prompt_token_ids, scores, top)
        return {
            "id": self.request_id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
            "usage": self._usage(),
            "prompt_token_ids": list(self.prompt_token_ids) if self.request.returns_token_ids else None,
            "prompt_logprobs": scored,
            **kept,
        }

    def _pieces(self, index: int, parts: list[ReplyPart], event: TextDelta | None) -> list[schemas.ChatCompletionChunk]:
        deltas: list[schemas.ChatDelta] = []
        for part in parts:
            match part:
                case ContentDelta(text):
                    deltas.append({"content": text})
                case ReasoningDelta(text):
                    deltas.append({"reasoning_content": text})
                case ToolCallStart(number, call_id, name):
                    self._choices[index].called = True
                    function: schemas.FunctionDelta = {"name": name, "arguments": ""}
                    deltas.append(
                        {"tool_calls": [{"index": number, "id": call_id, "type": "function", "function": function}]}
                    )
                case ToolCallArguments(number, text):
                    deltas.append({"tool_calls": [{"index": number, "function": {"arguments": text}}]})
        logprobs = self._logprobs(event.token_ids, event.scores) if event else None
        probed: schemas.ProbeFields = self._probed(self._choices[index], event.probed) if event else {}
        tokens = event.token_ids if event else []
        if ((logprobs and logprobs["content"]) or probed or (tokens and self.request.returns_token_ids)) and not deltas:
            deltas.append({})
        # The tokens of one step go with its first chunk.
        return [
            self._chunk(index, delta, logprobs=logprobs, probed=probed, tokens=tokens)
            if i == 0
            else self._chunk(index, delta)
            for i, delta in enumerate(deltas)
        ]

    def _probed(self, choice: _ChoiceState, scores: list[Tensor], acted: Sequence[Acted] = ()) -> schemas.ProbeFields:
        """Format the scores of a choice's next rows, and count them as sent."""
        if not scores or not (len(scores[0]) or acted):
            return {}
        start, choice.probed = choice.probed, choice.probed + len(scores[0])
        return {"probes": format_scores(self.probes, scores, self.n_prompt, start, acted)}

    def _logprobs(self, token_ids: list[int], scores: list[TokenScore]) -> schemas.ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        return chat_logprobs(self.tokenizer, token_ids, scores, as_ids=self.request.return_tokens_as_token_ids)

    def _finish_reason(self, choice: _ChoiceState, finished: Finished) -> schemas.ChatFinishReason:
        return "tool_calls" if choice.called and finished.finish_reason == "stop" else finished.finish_reason

    def _usage(self) -> schemas.Usage:
        n_generated = sum(choice.n_sent for choice in self._choices)
        return usage(self.n_prompt, n_generated, [[choice.done for choice in self._choices]])

    def _chunk(
        self,
        index: int,
        delta: schemas.ChatDelta,
        finish_reason: schemas.ChatFinishReason | None = None,
        logprobs: schemas.ChatLogprobs | None = None,
        probed: schemas.ProbeFields | None = None,
        tokens: list[int] | None = None,
    ) -> schemas.ChatCompletionChunk:
        choice: schemas.ChatChunkChoice = {
            "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason
        }  # fmt: skip
        if probed and "probes" in probed:
            choice["probes"] = probed["probes"]
        if self.request.returns_token_ids and tokens is not None:
            choice["token_ids"] = tokens
        return self._enveloped([choice])

    def _enveloped(self, choices: list[schemas.ChatChunkChoice]) -> schemas.ChatCompletionChunk:
        chunk: schemas.ChatCompletionChunk = {
            "id": self.request_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
        if self.request.counts_usage_in_chunks:
            chunk["usage"] = self._usage()
        return chunk


def usage(n_prompt: int, completion: int, dones: Sequence[Sequence[Done | None]]) -> schemas.Usage:
    """Return the token counts: each prompt once, and the completions of all choices.

    Args:
        n_prompt: number of tokens of the prompts.
        completion: number of tokens of all completions so far.
        dones: each prompt's choices. A prompt token counts as cached if no choice has computed it.
    """
    ended = [[done.finished.cached_tokens for done in choices if done is not None] for choices in dones]
    all_ended = all(len(found) == len(choices) for found, choices in zip(ended, dones, strict=True))
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": completion,
        "total_tokens": n_prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(map(min, ended))} if all_ended else None,
    }
