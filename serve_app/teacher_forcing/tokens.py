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

from roentgen.contract import is_text
from roentgen.store import Segment
from roentgen.transcripts import Transcript
from serve_app.engines.text import completion_offsets
from serve_app.models import LoadedModel
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message
from serve_app.openai_api.prompt import Prompt, render


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
        return self.n_prompt + max(self.n_completion - 1, 0)


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
        if len(text.token_ids) > model.context_length:
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
        prompt = _raw_prompt(tokenizer, transcript.prompt)
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
    words, offsets = completion_offsets(tokenizer.backend_tokenizer, completion, len(prompt.text))
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


def _raw_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> Prompt:
    """Tokenise raw text, after the token that begins every text, if the model knows one."""
    opening = tokenizer("")["input_ids"]
    if opening and opening[0] == tokenizer.bos_token_id:
        text = tokenizer.bos_token + text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [start for start, _ in encoded["offset_mapping"]]
    return Prompt(text, list(encoded["input_ids"]), offsets, [Segment("prompt", 0, len(text))])


def _completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> list[int]:
    """Tokenise a completion where it stands; alone, if a token would otherwise span the prompt's end.

    Alone is second best: some tokenizers put a space before a text's first word.
    """
    together: list[int] = list(tokenizer(prompt.text + completion, add_special_tokens=False)["input_ids"])
    n_prompt = len(prompt.token_ids)
    if together[:n_prompt] == prompt.token_ids:
        return together[n_prompt:]
    return list(tokenizer(completion, add_special_tokens=False)["input_ids"])


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
