"""Constrains a generation to a grammar: before each token, llguidance returns the allowed tokens, and all others are masked.

A `Grammar` does not depend on a tokenizer. `Constraints`, one per model, knows the model's tokens and compiles grammars for
them: a marker such as `<tool_call>` is a single token in some vocabularies, which text cannot produce, and text in others.
Compiling takes milliseconds, so the latest grammars are cached, and each generation gets a copy. JSON has one fixed format,
`{"a": 1, "b": [2, 3]}`, because a small model that may choose its white space may never end it.
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
"""Number of compiled grammars that are cached."""


MAX_REASON = 300
"""Largest number of characters of llguidance's reason that a client receives; the rest is its parser's state."""

MAX_LENGTH = 500_000
"""Largest number of characters of a grammar with its schemas; a larger one would take seconds to compile."""

STACK = 16 << 20
"""Bytes of stack for compiling; a MiB more for every 1024 characters. A schema of nothing but references needs a fifth of
that. Unused stack is never touched."""


class SchemaError(ConstraintError):
    """A JSON schema cannot be followed; `param` is the request's field with the schema."""

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
    """The request's field with the schema, for errors."""
    strict: bool
    """Whether a keyword that cannot be enforced is an error; otherwise it is ignored."""


@dataclass(frozen=True)
class Grammar:
    """The grammar of a generation."""

    rules: str
    """Rules in llguidance's dialect of Lark; `start` is the root rule."""
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    """Per rule that stands for JSON, its schema."""
    markers: Mapping[str, str] = field(default_factory=dict)
    """Per name X, a text that may be a single token. Rules may use X, the marker; `to_X`, any text up to and including it; and
    `without_X`, any text without it."""
    source: str = "tools"
    """The request's field with the rules, for errors."""

    @property
    def param(self) -> str:
        """The request's field that an error belongs to: that of the only schema, or that of the rules."""
        places = {schema.param for schema in self.schemas.values()}
        return places.pop() if len(places) == 1 else self.source


class Constraints:
    """Compiles grammars for one model's tokens; thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Create a compiler for a model's vocabulary; compiling the first grammar prepares it, which takes about a second.

        Args:
            tokenizer: a fast tokenizer.
            vocab_size: number of the model's logits.
            eos_token_ids: end-of-text tokens, at least one.
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
            ConstraintError: if the whole grammar cannot be followed, for instance because it is too large.
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
            raise ConstraintError(f"the schemas have {len(lark):,} characters; at most {MAX_LENGTH:,} are allowed")
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
    """Compile a complete grammar; raises what `Constraints.compile` does."""
    matcher = LLMatcher(vocabulary, lark, log_level=0)
    if matcher.is_error():
        raise _explain(grammar, matcher.get_error())
    for schema in grammar.schemas.values():
        if not has_finite_value(schema.schema):
            raise SchemaError(schema.param, "no value matches it: something that it requires contains itself")
    return matcher


def _on_a_large_stack(function: Callable[[], LLMatcher], length: int) -> LLMatcher:
    """Call a function in a thread whose stack suits a grammar of this length; one caller at a time.

    llguidance compiles references by recursion, without a limit. With a thread's usual stack, some hundred nested references
    end the process.
    """
    with ThreadPoolExecutor(1, "grammar") as pool:
        before = threading.stack_size(STACK + (length // 1024 << 20))
        try:
            future = pool.submit(function)  # starts the thread
        finally:
            threading.stack_size(before)
        return future.result()


class GrammarConstraint:
    """The allowed next tokens of one generation; one thread at a time may use it.

    Attributes:
        grammar: the grammar in llguidance's dialect of Lark, for an engine that runs llguidance itself.
        param: the request's field that it comes from.
    """

    def __init__(self, matcher: LLMatcher, grammar: str, param: str, size: int, eos_token_ids: list[int]) -> None:
        self.grammar = grammar
        self.param = param
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._bits = np.zeros(-(-size // 32), dtype=np.int32)

    def mask(self, logits: Float[Tensor, "vocab"]) -> None:
        """Set the logits of tokens that are not allowed to minus infinity, in place.

        Once the grammar is complete, only end-of-text tokens are allowed, even if something had masked them before.

        Raises:
            SchemaError: if no token is allowed.
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
        """Continue with a token.

        Raises:
            SchemaError: if it is not allowed.
        """
        if not self._matcher.consume_token(token):
            raise SchemaError(self.param, f"token {token} violates the grammar: {_reason(self._matcher.get_error())}")


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
    """Return the error of a grammar: of the schema that causes it, if one does."""
    for schema in grammar.schemas.values():
        failed, messages = LLMatcher.validate_grammar_with_warnings(f"%llguidance {{}}\nstart: {_json(schema)}")
        if failed:
            return SchemaError(schema.param, _reason(messages[0]))
    if not grammar.schemas:
        return SchemaError(grammar.source, _reason(error))
    return ConstraintError(f"the grammar cannot be followed: {_reason(error)}")


def _reason(error: str) -> str:
    """Return llguidance's reason, cut to `MAX_REASON` characters, without its parser's state and the grammar's text."""
    if "Too many items" in error:
        return "it is too complex for the parser"
    text = error.partition("<state>")[0].partition("<grammar>")[0]
    text = text.rpartition("failed to compile JSON schema: ")[2]
    text = " ".join(re.split(r"\n\s*\d+ \| ", text)[0].split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} …"
