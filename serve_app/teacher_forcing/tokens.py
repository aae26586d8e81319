"""Tokenizes transcripts for a model.

The model's own tokens are used if they are known (a run's rollout in the store, of the same model and revision), because
tokenizing a text does not always reproduce its tokens. Otherwise the chat template renders a conversation, the tokenizer
encodes raw text as the model expects it, and a completion that ended its turn gets the end-of-turn token. Prompt and
completion never share a token, because generation would have started between them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from roentgen.contract import is_text
from roentgen.errors import RoentgenError
from roentgen.tokenized_text import TokenizedText
from roentgen.transcripts import Transcript
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.models.tokenization import ASSISTANT, COMPLETION, completed, decode, tokenize_text
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message
from serve_app.openai_api.prompt import render

MARKS = ("\n", "a", "0")
"""Prefixes with which to tokenize a completion that does not start a text."""


class UnreadableTextError(RoentgenError):
    """A transcript cannot be tokenized for this model; the message says why."""


@dataclass(frozen=True)
class TokenizedTranscript:
    """A transcript with its tokens."""

    transcript: Transcript
    """The transcript."""
    sequence: TokenizedText
    """Prompt, of at least one token, and completion."""
    exact: bool = False
    """Whether these are the tokens that the model sampled, instead of its text tokenized again."""


def transcript_tokenizer(model: LoadedModel) -> Callable[[Transcript], TokenizedTranscript]:
    """Return a function that tokenizes transcripts for a model; it may raise `UnreadableTextError`."""
    end_of_turn = cache(lambda: _end_of_turn(model))

    def tokenize(transcript: Transcript) -> TokenizedTranscript:
        known = transcript.tokens
        exact = known is not None and (known.model, known.revision) == (model.source.name, model.source.revision)
        sequence = known.sequence if known is not None and exact else _tokenize(model, transcript, end_of_turn)
        if model.context_length is not None and len(sequence.token_ids) > model.context_length:
            raise UnreadableTextError(
                f"it has {len(sequence.token_ids)} tokens; the context of {model.source.name} is {model.context_length}"
            )
        return TokenizedTranscript(transcript, sequence, exact)

    return tokenize


def _tokenize(model: LoadedModel, transcript: Transcript, end_of_turn: Callable[[], int | None]) -> TokenizedText:
    if not all(is_text(text) for text in _words(transcript)):
        raise UnreadableTextError("it contains an unpaired surrogate, which cannot be encoded")
    raw = isinstance(transcript.prompt, str)
    if isinstance(transcript.prompt, str):
        whole = tokenize_text(model.tokenizer, transcript.prompt)
        # A text with a completion gets no end-of-text token.
        prompt = (whole if transcript.completion is None else whole.opened).prompt
    else:
        prompt = _conversation(model, transcript.prompt)
    if not prompt.token_ids:
        raise UnreadableTextError("its prompt has no tokens")
    if transcript.completion is None:
        return prompt
    completion = _completion_ids(model.tokenizer, prompt, transcript)
    if transcript.finish_reason == "stop":
        end = model.tokenizer.eos_token_id if raw else end_of_turn()
        if end is None:
            raise UnreadableTextError(f"it ends with 'stop', but {model.source.name} has no end-of-turn token")
        completion.append(end)
    return completed(model.tokenizer, prompt, completion, COMPLETION if raw else ASSISTANT)


def _words(transcript: Transcript) -> Iterator[str]:
    """Yield all texts of a transcript; messages are converted to JSON."""
    if isinstance(transcript.prompt, str):
        yield transcript.prompt
    else:
        yield json.dumps(transcript.prompt, ensure_ascii=False)
    yield transcript.completion or ""


def _conversation(model: LoadedModel, messages: tuple[dict[str, Any], ...]) -> TokenizedText:
    try:
        checked = [Message.model_validate(message) for message in messages]
        return render(model.tokenizer, checked, model.source.name).prompt
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnreadableTextError(f"a message cannot be rendered: {where}: {first['msg']}") from error
    except ApiError as error:
        raise UnreadableTextError(error.message) from error


def _completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: TokenizedText, transcript: Transcript) -> list[int]:
    """Tokenize a completion together with its prompt, or separately if a token would span the prompt's end.

    Some tokenizers add a space before a text's first word. So if tokenizing the completion alone changes its text, it is
    tokenized after a prefix with which it shares no token.
    """
    completion = transcript.completion or ""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if isinstance(transcript.prompt, str):
        together = tokenize_text(tokenizer, transcript.prompt + completion).opened.prompt.token_ids
    else:
        together = encode(prompt.text + completion)
    if together[: prompt.n_prompt] == prompt.token_ids:
        return together[prompt.n_prompt :]
    alone = encode(completion)
    behind = [
        ids[len(lead) :] for mark in MARKS if (ids := encode(mark + completion))[: len(lead := encode(mark))] == lead
    ]

    def reproduces_it(ids: list[int]) -> bool:
        return decode(tokenizer.backend_tokenizer, ids, after=prompt.token_ids)[0] == completion

    return next(filter(reproduces_it, (alone, *behind)), alone)


def _end_of_turn(model: LoadedModel) -> int | None:
    """Return the token that ends the assistant's turn in the model's chat template; a model may have several such tokens."""
    words = "Indeed."
    end_of_text: int | None = model.tokenizer.eos_token_id
    try:
        rendered = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": words}, {"role": "assistant", "content": words}], tokenize=False
        )
    except TemplateError:  # some templates require a system message
        return end_of_text
    after = model.tokenizer(str(rendered).rpartition(words)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in model.eos_token_ids), end_of_text)
