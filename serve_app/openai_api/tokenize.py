"""`/tokenize`, `/detokenize` and `/tokenizer_info`, in vLLM's format."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from roentgen.contract import no_booleans
from serve_app.engines.served_model import ServedModel
from serve_app.models.tokenization import tokenize_text
from serve_app.openai_api.errors import ApiError, enumerated
from serve_app.openai_api.messages import Message, Tool, Wire
from serve_app.openai_api.prompt import render
from serve_app.openai_api.schemas import DetokenizedText, TokenizerInfo, Tokens


class TokenizeRequest(Wire):
    """The body of `/tokenize`, with exactly one of `prompt` and `messages`."""

    model: str | None = None
    """The served model; lm-eval's remote tokenizer does not send it."""
    prompt: str | None = None
    """Raw text."""
    messages: list[Message] | None = Field(default=None, min_length=1)
    """A conversation, rendered as for a chat completion."""
    tools: list[Tool] = Field(default_factory=list)
    """Tools of the conversation."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template."""
    add_generation_prompt: bool = True
    """Whether a conversation ends with the start of a reply."""
    continue_final_message: bool = False
    """Whether the last message is left open."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens. Default: for raw text, but not for a rendered conversation."""
    return_token_strs: bool = False
    """Whether to return each token's text."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: send exactly one of prompt and messages")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("continue_final_message: requires add_generation_prompt: false")
        return self


class DetokenizeRequest(Wire):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(no_booleans)]


def check_tokens(token_ids: Sequence[int], n_tokens: int | None, param: str) -> None:
    """Check that token ids are in a model's range.

    Args:
        token_ids: the token ids.
        n_tokens: size of the range; None for no limit.
        param: the request's parameter that contains them.

    Raises:
        ApiError: naming the ids that are out of range.
    """
    if n_tokens is None:
        return
    if wrong := list(dict.fromkeys(token for token in token_ids if not 0 <= token < n_tokens)):
        found = f"{enumerated(map(str, wrong))} {'is' if len(wrong) == 1 else 'are'} out of vocabulary"
        raise ApiError(400, f"{param}: {found}; the model has {n_tokens} tokens, 0–{n_tokens - 1}", param=param)


def bad_word_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of words at the start of a text and, if it has the same length, in the middle.

    This is vLLM's rule. Other token sequences may still produce the same word.

    Raises:
        ApiError: if a word has no tokens.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        first, inner = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
        if not first:
            raise ApiError(400, f"bad_words: {word!r} has no tokens", param="bad_words")
        found[first] = None
        if len(inner) == len(first) and inner[0] != first[0]:
            found[inner] = None
    return tuple(found)


def tokenizer_info(model: ServedModel) -> TokenizerInfo:
    """Return what a client needs to render and tokenize like this server; lm-eval's remote tokenizer requests it."""
    tokenizer, limit = model.tokenizer, model.tokenizer.model_max_length
    added = tokenizer.added_tokens_decoder
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "model_max_length": limit if limit < VERY_LARGE_INTEGER else None,
        "vocab_size": len(tokenizer),
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "additional_special_tokens": [token.content for token in added.values() if token.special],
        "added_tokens_decoder": {str(token_id): token.content for token_id, token in added.items()},
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template is not None else None,
    }


def tokenize(model: ServedModel, request: TokenizeRequest) -> Tokens:
    """Return `{tokens, count, max_model_len, token_strs}`."""
    if request.messages is not None:
        token_ids = render(
            model.tokenizer,
            request.messages,
            model.source.name,
            tools=request.tools,
            template_kwargs=request.chat_template_kwargs,
            ending="open" if request.continue_final_message else "reply" if request.add_generation_prompt else "none",
            add_special_tokens=bool(request.add_special_tokens),
        ).prompt.token_ids
    else:
        raw = tokenize_text(
            model.tokenizer, request.prompt or "", add_special_tokens=request.add_special_tokens is not False
        )
        token_ids = raw.prompt.token_ids
    return {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": model.context_length,
        "token_strs": model.tokenizer.convert_ids_to_tokens(token_ids) if request.return_token_strs else None,
    }


def detokenize(model: ServedModel, request: DetokenizeRequest) -> DetokenizedText:
    """Return `{prompt}`.

    Raises:
        ApiError: if a token id is out of range.
    """
    # Embeddings are often padded beyond the tokenizer's vocabulary; such a token id has no text.
    check_tokens(request.tokens, max(len(model.tokenizer), model.n_embeddings), "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens)}
