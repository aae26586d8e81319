"""`/v1/completions`: completes raw prompts, given as text or token ids, without a chat template.

Evaluation harnesses measure the likelihood of texts through this route: nothing is generated (`max_tokens: 0`, or 1 and the
token is dropped), and `echo` with `logprobs` returns the log-probability of every prompt token.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from roentgen.contract import Int, no_booleans
from serve_app.capture.probe_scores import RequestProbe
from serve_app.engines.probe_stopping import Acted
from serve_app.engines.protocol import FinishReason, TextDelta, TokenScore
from serve_app.engines.storage import Done
from serve_app.engines.text import TextStream
from serve_app.models.tokenization import RawText, decode_tokens, tokenize_text
from serve_app.openai_api import schemas
from serve_app.openai_api.chat import usage
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.logprobs import Offsets, completion_logprobs, prompt_logprobs
from serve_app.openai_api.neutral import NeutralCompletionParams
from serve_app.openai_api.params import MAX_TOP_LOGPROBS, GenerationParams
from serve_app.openai_api.probe_params import format_scores
from serve_app.openai_api.tokenize import check_tokens

MAX_PROMPTS = 1024

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(no_booleans), Field(min_length=1)]


def _kind_of_prompt(prompt: Any) -> str:
    """Return the kind of a prompt by its first element, so that an error concerns only that kind."""
    if not isinstance(prompt, list):
        return "list[text]"
    first = prompt[0] if prompt else 0
    return "list[texts]" if isinstance(first, str) else "list[lists]" if isinstance(first, list) else "list[tokens]"


class CompletionRequest(NeutralCompletionParams, GenerationParams):
    """The body of a completion request."""

    prompt: Annotated[
        Annotated[str, Tag("list[text]")]
        | Annotated[TokenIds, Tag("list[tokens]")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("list[texts]")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("list[lists]")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[Int, Field(ge=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of: must equal n ({self.n}), because this server returns every choice it generates")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is allowed only with echo: true")
        if (asked := self.capture) is not None and asked.key is not None and len(self.prompts) > 1:
            raise ValueError("activations.key: a key identifies one rollout; send one prompt per request")
        if self.logprob_token_ids and (self.logprobs is None or self.max_tokens == 0):
            raise ValueError("logprob_token_ids: allowed only with logprobs and max_tokens above 0")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


def raw_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[int],
    *,
    add_special_tokens: bool,
    n_embeddings: int | None = None,
) -> RawText:
    """Tokenize a raw prompt; token ids are used as they are.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text or token ids.
        add_special_tokens: whether the tokenizer adds its special tokens at the start and end of a text.
        n_embeddings: number of the model's embeddings; None for the tokenizer's vocabulary.

    Raises:
        ApiError: if the prompt has no tokens, or a token id is out of range.
    """
    if isinstance(prompt, str):
        raw = tokenize_text(tokenizer, prompt, add_special_tokens=add_special_tokens)
        check_tokens(raw.prompt.token_ids, n_embeddings, "prompt")
    else:
        check_tokens(prompt, len(tokenizer) if n_embeddings is None else n_embeddings, "prompt")
        raw = decode_tokens(tokenizer, prompt)
    if not raw.prompt.token_ids:
        raise ApiError(400, "prompt: empty, and this model has no beginning-of-text token", param="prompt")
    return raw


@dataclass
class CompletionReply:
    """Builds the reply to one request from the events of its choices: `n` per prompt, in the order of the prompts."""

    request: CompletionRequest
    """The request."""
    request_id: str
    """The reply's id."""
    tokenizer: PreTrainedTokenizerBase
    """The model's tokenizer, to format log-probabilities."""
    prompts: list[RawText]
    """The tokenized prompts."""
    markers: Mapping[int, str]
    """Special tokens that are part of the text."""
    probes: tuple[RequestProbe, ...] = ()
    """Probes that score the tokens."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._dones: list[Done | None] = [None] * (len(self.prompts) * self.request.n)
        self._offsets = [self._new_offsets(index) for index in range(len(self._dones))]
        self._scored = [0] * len(self._dones)  # rows whose scores have been sent
        self._n_sent = [0] * len(self._dones)  # tokens that have been sent
        self._begun = [False] * len(self._dones)

    def opening(self) -> list[schemas.CompletionChunk]:
        """Return the first chunks of a stream: the prompts, if they are echoed without log-probabilities."""
        if not self.request.echo or self.request.logprobs is not None:
            return []
        return [self._chunk(i, self._prompt(i).echo, None) for i in range(len(self._dones))]

    def delta(self, index: int, event: TextDelta) -> list[schemas.CompletionChunk]:
        """Return the chunks for a choice's new text; with echoed log-probabilities they wait for those of the prompt."""
        self._n_sent[index] += len(event.token_ids)
        if self.request.echo and self.request.logprobs is not None:
            return []
        logprobs = self._logprobs(event.token_ids, list(event.scores), self._offsets[index])
        probed = self._probed(index, event.probed)
        return [self._chunk(index, event.text, logprobs, probed=probed, tokens=event.token_ids)]

    def done(self, index: int, done: Done) -> list[schemas.CompletionChunk]:
        """Return the last chunks of a choice."""
        self._dones[index] = done
        late = self.request.echo and self.request.logprobs is not None
        finished = done.finished
        text, logprobs = self._text_and_logprobs(index, done) if late else ("", None)
        rest = finished.token_ids[0 if late else self._n_sent[index] :]
        self._n_sent[index] = len(finished.token_ids)
        probed = self._probed(index, [scores[self._scored[index] :] for scores in finished.probed], finished.acted)
        last = self._chunk(index, text, logprobs, finished.finish_reason, probed, rest)
        last["choices"][0]["stop_reason"] = finished.stop_reason
        return [last]

    def closing(self, kept: schemas.CaptureFields) -> list[schemas.CompletionChunk]:
        """Return the chunks after all choices: usage if requested, and activations."""
        counted: schemas.UsageFields = {"usage": self._usage()} if self.request.counts_usage else {}
        return [{**self._enveloped([]), **counted, **kept}] if counted or kept else []

    def whole(self, dones: list[Done], kept: schemas.CaptureFields) -> schemas.Completion:
        """Return the whole reply of a request without streaming."""
        self._dones = list(dones)
        choices: list[schemas.CompletionChoice] = []
        for index, done in enumerate(dones):
            text, logprobs = self._text_and_logprobs(index, done)
            finished, prompt_ids = done.finished, self._prompt(index).prompt.token_ids
            self._n_sent[index] = len(finished.token_ids)
            scores, top = finished.prompt_scores, self.request.prompt_logprobs
            scored = None
            if scores is not None and top is not None:
                scored = prompt_logprobs(self.tokenizer, prompt_ids, scores, top)
            choices.append(
                {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": finished.finish_reason,
                    "stop_reason": finished.stop_reason,
                    "token_ids": finished.token_ids if self.request.returns_token_ids else None,
                    "prompt_token_ids": prompt_ids if self.request.returns_token_ids else None,
                    "prompt_logprobs": scored,
                    **self._probed(index, finished.probed, finished.acted),
                }
            )
        return {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
            "usage": self._usage(),
            **kept,
        }

    def _text_and_logprobs(self, index: int, done: Done) -> tuple[str, schemas.CompletionLogprobs | None]:
        finished, prompt = done.finished, self._prompt(index)
        spoken = len(finished.token_ids) - (finished.ended_by is not None)
        tokens, scores = finished.token_ids[:spoken], list[TokenScore | None](finished.scores[:spoken])
        if not self.request.echo:
            return finished.text, self._logprobs(tokens, scores, self._new_offsets(index))
        if finished.prompt_scores is not None:
            # `prompt_logprobs` may have requested more alternatives.
            n = self.request.logprobs or 0
            scores = [None, *(replace(score, top=score.top[:n]) for score in finished.prompt_scores), *scores]
        offsets = self._new_offsets(index, start=len(prompt.echo))
        logprobs = self._logprobs(prompt.prompt.token_ids + tokens, scores, offsets, prompt.echo_offsets)
        return prompt.echo + finished.text, logprobs

    def _logprobs(
        self, tokens: list[int], scores: list[TokenScore | None], offsets: Offsets, echoed: Sequence[int] = ()
    ) -> schemas.CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        as_ids = self.request.return_tokens_as_token_ids
        return completion_logprobs(self.tokenizer, tokens, scores, offsets, echoed, as_ids=as_ids)

    def _new_offsets(self, index: int, start: int = 0) -> Offsets:
        core, after = self.tokenizer.backend_tokenizer, self._prompt(index).prompt.token_ids
        include_stop = self.request.include_stop_str_in_output
        stream = TextStream(core, tuple(self.request.stop), self.markers, after, include_stop=include_stop)
        return Offsets(self.tokenizer, stream, start=start, min_tokens=self.request.min_tokens)

    def _probed(self, index: int, scores: list[Tensor], acted: Sequence[Acted] = ()) -> schemas.ProbeFields:
        """Format the scores of a choice's next rows, and count them as sent."""
        if not scores or not (len(scores[0]) or acted):
            return {}
        start = self._scored[index]
        self._scored[index] += len(scores[0])
        return {"probes": format_scores(self.probes, scores, self._prompt(index).prompt.n_prompt, start, acted)}

    def _prompt(self, index: int) -> RawText:
        return self.prompts[index // self.request.n]

    def _usage(self) -> schemas.Usage:
        n_prompt = sum(raw.prompt.n_prompt for raw in self.prompts)
        n = self.request.n
        choices = [self._dones[start : start + n] for start in range(0, len(self._dones), n)]
        return usage(n_prompt, sum(self._n_sent), choices)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: schemas.CompletionLogprobs | None,
        finish_reason: FinishReason | None = None,
        probed: schemas.ProbeFields | None = None,
        tokens: list[int] | None = None,
    ) -> schemas.CompletionChunk:
        choice: schemas.CompletionChunkChoice = {
            "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason
        }  # fmt: skip
        if probed and "probes" in probed:
            choice["probes"] = probed["probes"]
        if self.request.returns_token_ids:
            choice["token_ids"] = tokens or []
            if not self._begun[index]:
                choice["prompt_token_ids"] = self._prompt(index).prompt.token_ids
                self._begun[index] = True
        return self._enveloped([choice])

    def _enveloped(self, choices: list[schemas.CompletionChunkChoice]) -> schemas.CompletionChunk:
        chunk: schemas.CompletionChunk = {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.request.model,
            "choices": choices,
        }
        if self.request.counts_usage_in_chunks:
            chunk["usage"] = self._usage()
        return chunk
