"""Request parameters of vLLM that OpenAI's API does not have, with vLLM's names.

Test suites, load generators and interpretability tools send these to any OpenAI-compatible server. Parameters of vLLM that
this server does not support are refused by name, like every unknown parameter.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from roentgen.contract import Float, Int, no_booleans
from serve_app.openai_api.messages import Wire
from serve_app.openai_api.structured_outputs import StructuredOutputs

MAX_TOP_LOGPROBS = 20
MAX_NAMED = 128
"""Maximum number of `logprob_token_ids`, as in vLLM."""
MAX_BAD_WORDS = 128

Token = Annotated[int, Field(ge=0)]

OLDER = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
"""Older parameters for constraints, and the field of `structured_outputs` that each corresponds to."""


class VllmParams(Wire):
    """vLLM's parameters for sampling, prompt truncation and the content of replies."""

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
            raise ValueError(f"{min(older)}: structured_outputs is another name for it; send only one of them")
        if len(older) > 1:
            raise ValueError(f"{max(older)}: send only one of {', '.join(sorted(older))}")
        if self.ignore_eos and (self.structured_outputs or older):
            raise ValueError("ignore_eos: not allowed with a grammar, which determines where the text ends")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: 0 leaves no prompt; -1 keeps as many tokens as fit")
        return self

    @property
    def structured(self) -> tuple[str, StructuredOutputs] | None:
        """The constraint, and the name of its parameter; None for free text."""
        if self.structured_outputs is not None:
            return f"structured_outputs.{self.structured_outputs.kind}", self.structured_outputs
        for name, kind in OLDER.items():
            if (value := getattr(self, name)) is not None:
                return name, StructuredOutputs.model_validate({kind: value})
        return None
