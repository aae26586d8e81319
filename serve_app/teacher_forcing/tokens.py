"""From a transcript to the tokens a model is fed.

The model's own tokens are taken where they are known (a run's rollout in the store, same model and revision), because a
text does not always give back the tokens that spelled it. Else a conversation goes through the chat template, raw text
through the tokenizer as the model expects it, and a completion that ended its turn gets the token that says so. Prompt and
completion never share a token: that is where generation would have begun.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from roentgen.contract import count_rows, is_text
from roentgen.store import Segment
from roentgen.transcripts import Transcript
from serve_app.engines.prompt import Prompt
from serve_app.engines.text import completion_offsets
from serve_app.engines.transformers.model import LoadedModel
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message
from serve_app.openai_api.prompt import render
from serve_app.openai_api.raw_text import tokenized

MARKS = ("\n", "a", "0")
"""What a completion is put behind, to tokenise it as something that does not begin a text."""


class UnreadableTextError(Exception):
    """A transcript cannot be given to this model; the message says why."""


@dataclass(frozen=True)
class TokenisedText:
    """A transcript as the model is fed it.

    Attributes:
        transcript: what it is of.
        token_ids: prompt and completion.
        token_offsets: first character in `text` of each of `token_ids`.
        n_prompt: tokens in the prompt, at least one.
        text: what the tokens spell, special tokens included.
        segments: who spoke which characters.
        exact: whether these are the very tokens that the model sampled, not its text tokenised again.
    """

    transcript: Transcript
    token_ids: list[int]
    token_offsets: list[int]
    n_prompt: int
    text: str
    segments: list[Segment]
    exact: bool = False

    @property
    def n_completion(self) -> int:
        """Tokens in the completion."""
        return len(self.token_ids) - self.n_prompt

    @property
    def n_rows(self) -> int:
        """Rows of a full capture: a completion's last token has none, as in generation, where it is never fed."""
        return count_rows(self.n_prompt, self.n_completion)


def tokeniser(model: LoadedModel) -> Callable[[Transcript], TokenisedText]:
    """Return the function that spells transcripts for a model; it raises `UnreadableTextError` where it cannot."""
    end_of_turn = cache(lambda: _end_of_turn(model))

    def tokenise(transcript: Transcript) -> TokenisedText:
        known = transcript.tokens
        if known is not None and (known.model, known.revision) == (model.source.name, model.source.revision):
            text = TokenisedText(
                transcript, known.token_ids, known.token_offsets, known.n_prompt, known.text, known.segments, exact=True
            )
        else:
            text = _spell(model, transcript, end_of_turn)
        if model.context_length is not None and len(text.token_ids) > model.context_length:
            raise UnreadableTextError(
                f"it has {len(text.token_ids)} tokens; the context of {model.source.name} is {model.context_length}"
            )
        return text

    return tokenise


def _spell(model: LoadedModel, transcript: Transcript, end_of_turn: Callable[[], int | None]) -> TokenisedText:
    tokenizer = model.tokenizer
    if not all(is_text(said) for said in _words(transcript)):
        raise UnreadableTextError("it has half a surrogate pair, which is no text")
    if raw := isinstance(transcript.prompt, str):
        prompt = _raw_prompt(tokenizer, transcript.prompt, continued=transcript.completion is not None)
    else:
        prompt = _conversation(model, transcript.prompt)
    if not prompt.token_ids:
        raise UnreadableTextError("its prompt has no tokens")
    completion, said = [], []
    if transcript.completion is not None:
        completion = _completion_ids(tokenizer, prompt, transcript.completion)
        if transcript.finish_reason == "stop":
            end = tokenizer.eos_token_id if raw else end_of_turn()
            if end is None:
                raise UnreadableTextError(f"it ends with 'stop', and {model.source.name} has no token that says so")
            completion.append(end)
    words, offsets = completion_offsets(
        tokenizer.backend_tokenizer, completion, len(prompt.text), after=prompt.token_ids
    )
    text = prompt.text + words
    if transcript.completion is not None:
        said = [Segment("completion" if raw else "assistant", len(prompt.text), len(text))]
    return TokenisedText(
        transcript=transcript,
        token_ids=prompt.token_ids + completion,
        token_offsets=prompt.token_offsets + offsets,
        n_prompt=len(prompt.token_ids),
        text=text,
        segments=[*prompt.segments, *said],
    )


def _words(transcript: Transcript) -> Iterator[str]:
    """Yield all that is said in a transcript, spelled as JSON where it has parts."""
    if isinstance(transcript.prompt, str):
        yield transcript.prompt
    else:
        yield json.dumps(transcript.prompt, ensure_ascii=False)
    yield transcript.completion or ""


def _conversation(model: LoadedModel, messages: tuple[dict[str, Any], ...]) -> Prompt:
    try:
        checked = [Message.model_validate(message) for message in messages]
        return render(model.tokenizer, checked, model.source.name)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnreadableTextError(f"a message of it cannot be rendered: {where}: {first['msg']}") from error
    except ApiError as error:
        raise UnreadableTextError(error.message) from error


def _raw_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, continued: bool) -> Prompt:
    """Tokenise raw text as the tokenizer does; one that is continued does not get what ends a text."""
    raw = tokenized(tokenizer, text)
    raw = raw.opened if continued else raw
    return Prompt(raw.text, raw.token_ids, raw.token_offsets, [Segment("prompt", 0, len(raw.text))], given=text)


def _completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """Tokenise a completion where it stands; apart from the prompt, if a token would otherwise span the prompt's end.

    Some tokenizers put a space before a text's first word. So apart means behind something else that it shares no token with,
    if it does not spell the same alone.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if prompt.given is None:
        together = encode(prompt.text + completion)
    else:
        together = tokenized(tokenizer, prompt.given + completion).opened.token_ids
    n_prompt = len(prompt.token_ids)
    if together[:n_prompt] == prompt.token_ids:
        return together[n_prompt:]
    alone = encode(completion)
    behind = [
        ids[len(lead) :] for mark in MARKS if (ids := encode(mark + completion))[: len(lead := encode(mark))] == lead
    ]

    def spelled(ids: list[int]) -> str:
        return completion_offsets(tokenizer.backend_tokenizer, ids, 0, after=prompt.token_ids)[0]

    return next((ids for ids in (alone, *behind) if spelled(ids) == completion), alone)


def _end_of_turn(model: LoadedModel) -> int | None:
    """Return the token that ends the assistant's turn in the model's chat template; models end texts with several."""
    words = "Indeed."
    try:
        rendered = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": words}, {"role": "assistant", "content": words}], tokenize=False
        )
    except TemplateError:  # some templates want a system message first
        return model.tokenizer.eos_token_id
    after = model.tokenizer(str(rendered).rpartition(words)[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in model.eos_token_ids), model.tokenizer.eos_token_id)
