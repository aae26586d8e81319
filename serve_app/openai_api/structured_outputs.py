"""`structured_outputs`: a schema, a regular expression, a list of choices or a grammar that constrains the generated text.

This is vLLM's parameter. Each kind becomes a rule `answer` of a grammar, which llguidance enforces on both engines. Grammars
are in llguidance's dialect of Lark, or in GBNF (`root ::= …`), which is translated to it.
"""

import json
import re
from typing import Any, Literal, Self

from llguidance.gbnf_to_lark import any_to_lark
from pydantic import Field, model_validator

from serve_app.engines.constraints import Grammar
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.grammars import after_thoughts, answer_grammar, closed_schema
from serve_app.openai_api.messages import Wire
from serve_app.openai_api.reply_parser import Reasoning

Kind = Literal["json", "regex", "choice", "grammar", "json_object"]
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(Wire):
    """A constraint on the generated text; exactly one field is set."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as text; `json` on the wire."""
    regex: str | None = None
    """A regular expression that the whole text must match."""
    choice: list[str] | None = Field(default=None, min_length=1, max_length=1024)
    """Texts, one of which is generated."""
    grammar: str | None = None
    """A grammar in Lark or GBNF."""
    json_object: Literal[True] | None = None
    """Any JSON object."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in KINDS if self._value(kind) is not None]
        if len(given) != 1:
            found = f"found {', '.join(given)}" if given else "found none"
            raise ValueError(f"exactly one of {', '.join(KINDS)} is required; {found}")
        if isinstance(self.json_, str):
            try:
                schema = json.loads(self.json_)
            except json.JSONDecodeError as error:
                raise ValueError(f"json: not valid JSON: {error}") from error
            if not isinstance(schema, dict):
                raise ValueError("json: a schema must be a JSON object")
        if self.choice is not None and not all(self.choice):
            raise ValueError("choice: empty texts are not allowed")
        return self

    @property
    def kind(self) -> Kind:
        """The name of the field that is set."""
        return next(kind for kind in KINDS if self._value(kind) is not None)

    def to_grammar(self, param: str, *, reasoning: Reasoning = "none") -> Grammar:
        """Return the constraint as a grammar.

        Args:
            param: the request's parameter, for errors.
            reasoning: how the text begins.

        Raises:
            ApiError: if a grammar in GBNF is not valid.
        """
        if self.json_ is not None:
            schema = json.loads(self.json_) if isinstance(self.json_, str) else self.json_
            return answer_grammar(closed_schema(schema, param), reasoning=reasoning)
        if self.regex is not None:
            rule = f"answer: /{_regex_literal(self.regex)}/"
        elif self.choice is not None:
            rule = f"answer: {' | '.join(json.dumps(text) for text in self.choice)}"
        elif self.grammar is not None:
            rule = f"answer: %lark {{\n{_lark(self.grammar, param)}\n}}"
        else:
            return answer_grammar(closed_schema({"type": "object"}, param), reasoning=reasoning)
        return after_thoughts(rule, {}, {}, reasoning, param=param)

    def _value(self, kind: Kind) -> Any:
        return getattr(self, "json_" if kind == "json" else kind)


def _regex_literal(pattern: str) -> str:
    r"""Convert a regular expression to a Lark literal; it always matches the whole text, so `^` and `$` are removed."""
    pattern = re.sub(r"^((?:[^\\]|\\.)*)\$$", r"\1", pattern.removeprefix("^"), flags=re.DOTALL)
    escapes = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(r"\\.|/|\n", lambda found: escapes.get(found[0], found[0]), pattern, flags=re.DOTALL)


def _lark(grammar: str, param: str) -> str:
    """Return a grammar in Lark; GBNF is translated.

    Raises:
        ApiError: if the translation fails.
    """
    if "::=" not in grammar:
        return grammar
    try:
        return str(any_to_lark(grammar))
    except Exception as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="unsupported_schema") from error
