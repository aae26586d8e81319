"""Parameters of a request that are vLLM's and not OpenAI's, spelled as vLLM spells them.

Suites, load generators and tools for interpretability send these to any OpenAI-compatible server. Those that vLLM has and this
server has not are refused by name, as every unknown parameter is.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from roentgen.contract import Float, Int, no_booleans
from serve_app.openai_api.messages import Wire
from serve_app.openai_api.structured_outputs import StructuredOutputs

MAX_TOP_LOGPROBS = 20
MAX_NAMED = 128
"""Tokens whose scores a request may name, as in vLLM."""
MAX_BAD_WORDS = 128

Token = Annotated[int, Field(ge=0)]

OLDER = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
"""The older spellings of a constraint, and which of `structured_outputs` each is."""


class VllmParams(Wire):
    """How to choose tokens, what of the prompt to take, and what to tell, beyond OpenAI's parameters."""

    min_p: Float = Field(default=0, ge=0, le=1)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    allowed_token_ids: Annotated[list[Token], BeforeValidator(no_booleans), Field(min_length=1)] | None = None
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=MAX_BAD_WORDS)
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    logprob_token_ids: Annotated[list[Token], BeforeValidator(no_booleans)] = Field(default=[], max_length=MAX_NAMED)
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool = False
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        older = {name: value for name in OLDER if (value := getattr(self, name)) is not None}
        if self.structured_outputs is not None and older:
            raise ValueError(
                f"{min(older)}: it and structured_outputs are two spellings of one thing; send one of them"
            )
        if len(older) > 1:
            raise ValueError(f"{max(older)}: a text follows one of {', '.join(sorted(older))}; send one of them")
        if self.ignore_eos and (self.structured_outputs or older):
            raise ValueError("ignore_eos: a text that follows a grammar ends where the grammar ends")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: 0 leaves no prompt; -1 keeps as many tokens as fit")
        return self

    @property
    def structured(self) -> tuple[str, StructuredOutputs] | None:
        """What the text has to follow, and the name of the parameter that says so; None for nothing."""
        if self.structured_outputs is not None:
            return f"structured_outputs.{self.structured_outputs.kind}", self.structured_outputs
        for name, kind in OLDER.items():
            if (value := getattr(self, name)) is not None:
                return name, StructuredOutputs.model_validate({kind: value})
        return None
