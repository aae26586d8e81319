"""`/tokenize` and `/detokenize`, spelled as vLLM spells them: how many tokens a text or a conversation takes, and which."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from roentgen.contract import no_booleans
from serve_app.engines.served_model import ServedModel
from serve_app.models.tokenization import tokenize_text
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.messages import Message, Tool, Wire
from serve_app.openai_api.prompt import render
from serve_app.openai_api.schemas import DetokenizedText, Tokens


class TokenizeRequest(Wire):
    """Exactly one of `prompt` and `messages`."""

    model: str
    """The served model."""
    prompt: str | None = None
    """Raw text."""
    messages: list[Message] | None = Field(default=None, min_length=1)
    """A conversation, rendered as for a chat completion."""
    tools: list[Tool] = Field(default_factory=list)
    """On offer in it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """For the template."""
    add_special_tokens: bool = True
    """Whether raw text gets the tokens that begin a text."""
    return_token_strs: bool = False
    """Whether to return each token's text."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: send either prompt or messages")
        return self


class DetokenizeRequest(Wire):
    """Tokens to turn into text."""

    model: str
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(no_booleans)]


def check_tokens(token_ids: Sequence[int], n_tokens: int | None, param: str) -> None:
    """Check that a model knows some tokens.

    Args:
        token_ids: the tokens.
        n_tokens: how many there are; None for no limit.
        param: the request's parameter that they come from.

    Raises:
        ApiError: naming the first that it does not know.
    """
    if n_tokens is None:
        return
    if (wrong := next((token for token in token_ids if not 0 <= token < n_tokens), None)) is not None:
        raise ApiError(400, f"{param}: {wrong} is not a token; the model has 0–{n_tokens - 1}", param=param)


def tokenize(model: ServedModel, request: TokenizeRequest) -> Tokens:
    """Return `{tokens, count, max_model_len}` and, if asked, `token_strs`."""
    if request.messages is not None:
        token_ids = render(
            model.tokenizer,
            request.messages,
            model.source.name,
            tools=request.tools,
            template_kwargs=request.chat_template_kwargs,
        ).prompt.token_ids
    else:
        raw = tokenize_text(model.tokenizer, request.prompt or "", add_special_tokens=request.add_special_tokens)
        token_ids = raw.prompt.token_ids
    reply: Tokens = {"tokens": token_ids, "count": len(token_ids), "max_model_len": model.context_length}
    if request.return_token_strs:
        reply["token_strs"] = model.tokenizer.convert_ids_to_tokens(token_ids)
    return reply


def detokenize(model: ServedModel, request: DetokenizeRequest) -> DetokenizedText:
    """Return `{prompt}`.

    Raises:
        ApiError: if a token is none of the model's.
    """
    # Embeddings are often padded beyond the tokenizer's tokens; what such a row stands for is no text.
    check_tokens(request.tokens, max(len(model.tokenizer), model.n_embeddings), "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens)}
