"""Makes a generation follow a grammar: before each token, llguidance says which tokens can go on, and the others are ruled out.

A `Grammar` is written without regard to a tokenizer. `Constraints`, one per model, knows the model's tokens and compiles
grammars for them: a marker such as `<tool_call>` is one token in some vocabularies, which text cannot spell, and text in
others. Compiling takes milliseconds, so the last grammars are kept and copied, one copy to a generation. JSON is written in
one way only, `{"a": 1, "b": [2, 3]}`, because a small model that may choose its white space may never end it.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import llguidance.hf
import numpy as np
import torch
from jaxtyping import Float
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from serve_app.engines.protocol import ConstraintError
from serve_app.engines.recursive_schemas import has_finite_value

KEPT = 32
"""Compiled grammars that are kept, the last ones used."""


MAX_REASON = 300
"""Characters of llguidance's reason that a client is given; the rest is its parser's state."""

MAX_LENGTH = 500_000
"""Characters a grammar may have with its schemas; a larger one would take seconds to compile."""

STACK = 16 << 20
"""Bytes of stack to compile on, and a MiB more for every 1024 characters: schemas of nothing but references take a fifth of
that. What is not needed is never touched."""


class SchemaError(ConstraintError):
    """A JSON schema cannot be followed; `param` says where the request has it."""

    prefix = ""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param


@dataclass(frozen=True)
class Schema:
    """A JSON schema within a grammar."""

    schema: Mapping[str, Any]
    """The schema."""
    param: str
    """Where the request has it, for errors."""
    strict: bool
    """Whether a keyword that cannot be enforced is an error; otherwise it is left out."""


@dataclass(frozen=True)
class Grammar:
    """What may be generated."""

    rules: str
    """In llguidance's dialect of Lark; `start` is the whole."""
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    """By the rule that stands for JSON matching it."""
    markers: Mapping[str, str] = field(default_factory=dict)
    """Texts that may be a token of their own, by a name X. The rules may use X, the marker; `to_X`, any text up to and with
    it; and `without_X`, any text in which it does not occur."""
    source: str = "tools"
    """Where the request has the rules, for errors."""

    @property
    def param(self) -> str:
        """Where the request has what it must follow: the one schema's place, or that of the rules."""
        places = {schema.param for schema in self.schemas.values()}
        return places.pop() if len(places) == 1 else self.source


class Constraints:
    """Compiles grammars for one model's tokens; any thread may."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Take a model's vocabulary; it is prepared (about a second) when the first grammar is compiled.

        Args:
            tokenizer: a fast tokenizer.
            vocab_size: how many logits the model has.
            eos_token_ids: tokens that end a generation, at least one.
        """
        self._tokenizer = tokenizer
        self._size = max(vocab_size, len(tokenizer))
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> "GrammarConstraint":
        """Return a constraint for one generation.

        Raises:
            SchemaError: if one of the grammar's schemas cannot be followed, with the reason.
            ConstraintError: if the grammar as a whole cannot be, for instance because it is too large.
        """
        added = self._tokenizer.get_added_vocab()
        lark = "\n".join(
            [
                "%llguidance {}",
                grammar.rules,
                *(f"{rule}: {_json(schema)}" for rule, schema in grammar.schemas.items()),
                *(_marker_rules(name, marker, added.get(marker)) for name, marker in grammar.markers.items()),
            ]
        )
        if len(lark) > MAX_LENGTH:
            raise ConstraintError(f"the schemas take {len(lark):,} characters; at most {MAX_LENGTH:,} are followed")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.hf.from_tokenizer(self._tokenizer, self._size, self._eos_token_ids)
            matcher = self._compiled.get(lark)
            if matcher is None:
                matcher = _on_a_large_stack(partial(_compiled, self._vocabulary, grammar, lark), len(lark))
                self._compiled[lark] = matcher
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(lark)
            return GrammarConstraint(matcher.deep_copy(), lark, grammar.param, self._size, self._eos_token_ids)


def _compiled(vocabulary: LLTokenizer, grammar: Grammar, lark: str) -> LLMatcher:
    """Compile a grammar that is written out, or raise what `Constraints.compile` does."""
    matcher = LLMatcher(vocabulary, lark, log_level=0)
    if matcher.is_error():
        raise _explain(grammar, matcher.get_error())
    for schema in grammar.schemas.values():
        if not has_finite_value(schema.schema):
            raise SchemaError(schema.param, "no value matches it: something that it requires contains itself")
    return matcher


def _on_a_large_stack(function: Callable[[], LLMatcher], length: int) -> LLMatcher:
    """Call a function in a thread whose stack suits a grammar of so many characters; one caller at a time.

    llguidance compiles references by recursion, without a limit. On a thread's usual stack some hundred of them, one inside
    the other, end the process.
    """
    with ThreadPoolExecutor(1, "grammar") as pool:
        before = threading.stack_size(STACK + (length // 1024 << 20))
        try:
            future = pool.submit(function)  # starts the thread
        finally:
            threading.stack_size(before)
        return future.result()


class GrammarConstraint:
    """What may come next in one generation; one thread at a time may use it.

    Attributes:
        grammar: what it follows, in llguidance's dialect of Lark, for an engine that runs llguidance itself.
        param: where the request has it.
    """

    def __init__(self, matcher: LLMatcher, grammar: str, param: str, size: int, eos_token_ids: list[int]) -> None:
        self.grammar = grammar
        self.param = param
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._bits = np.zeros(-(-size // 32), dtype=np.int32)

    def mask(self, logits: Float[Tensor, "vocab"]) -> None:
        """Set the logits of tokens that may not come to minus infinity, in place.

        Once nothing else may come, tokens that end the generation may, even if something had ruled them out before.

        Raises:
            SchemaError: if nothing may come.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            eos = torch.tensor(self._eos_token_ids, device=logits.device)
            kept = logits[eos]
            logits.fill_(-torch.inf)
            logits[eos] = torch.where(kept.isfinite(), kept, 0)
            return
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise SchemaError(
                self.param, f"the grammar cannot be followed any further: {_reason(self._matcher.get_error())}"
            )
        allowed = np.unpackbits(self._bits.view(np.uint8), count=len(logits), bitorder="little")
        logits.masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Go on with a token.

        Raises:
            SchemaError: if it may not come.
        """
        if not self._matcher.consume_token(token):
            raise SchemaError(self.param, f"token {token} is against the grammar: {_reason(self._matcher.get_error())}")


def _json(schema: Schema) -> str:
    options = {
        "item_separator": ", ",
        "key_separator": ": ",
        "whitespace_flexible": False,
        "lenient": not schema.strict,
    }
    return f"%json {json.dumps({**schema.schema, 'x-guidance': options})}"


def _marker_rules(name: str, marker: str, token: int | None) -> str:
    quoted, pattern = json.dumps(marker), re.escape(marker).replace("/", r"\/")
    text = f"WITHOUT_{name.upper()}: /(?s:.*)/ & ~/(?s:.*){pattern}(?s:.*)/\nwithout_{name}: WITHOUT_{name.upper()}"
    if token is not None:
        return f"{text}\n{name}: <[{token}]>\nto_{name}: without_{name} {name}"
    return f"{text}\n{name}: {quoted}\nto_{name}[lazy]: WITHOUT_{name.upper()} {quoted}"


def _explain(grammar: Grammar, error: str) -> ConstraintError:
    """Say which schema of a grammar is to blame for an error, if one is."""
    for schema in grammar.schemas.values():
        failed, said = LLMatcher.validate_grammar_with_warnings(f"%llguidance {{}}\nstart: {_json(schema)}")
        if failed:
            return SchemaError(schema.param, _reason(said[0]))
    if not grammar.schemas:
        return SchemaError(grammar.source, _reason(error))
    return ConstraintError(f"the grammar cannot be followed: {_reason(error)}")


def _reason(error: str) -> str:
    """Return what llguidance says, cut to `MAX_REASON` characters, without its parser's state and our grammar's text."""
    if "Too many items" in error:
        return "it is too complex for the parser"
    said = error.partition("<state>")[0].partition("<grammar>")[0]
    said = said.rpartition("failed to compile JSON schema: ")[2]
    said = " ".join(re.split(r"\n\s*\d+ \| ", said)[0].split())
    return said if len(said) <= MAX_REASON else f"{said[:MAX_REASON]} …"
