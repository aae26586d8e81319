"""Reads and compares answers with Hugging Face's math-verify, as many leaderboards do.

The library bounds its time with `signal.alarm()`, which works only in a process's main thread, cannot interrupt Python's long
integers, and would let a verdict depend on how fast the machine is. So its time limits are off and its input is bounded: only
the end of a long text is read, and a text in which a short formula can stand for a very large number or an endless calculation
(towers of powers, factorials, sums, integrals) is not read.
"""

import logging
import re
from functools import cache, lru_cache
from typing import Any

MAX_LENGTH = 1_000
"""Number of characters read at the end of a text; the library's patterns take more than linear time."""

MAX_DEPTH = 24
"""Maximum nesting of brackets; the library's parser takes more than quadratic time."""

_POWER = r"(?:\^|(?<=[\w)}\]])\s*\*\*)"
_UNBOUNDED = re.compile(
    rf"{_POWER}\s*[{{(\[]*\s*[-+]?\s*(?:[{{(\[\\]|\d{{3,}}|\d+\s*[)}}\]]*\s*(?:\^|\*\*\s*\d|!))"  # 2^(…), 2^1000, 2^3^4
    rf"|[)}}\]]\s*(?:\^|\*\*\s*[\d(])"  # (2^9)^9
    rf"|\d{{13,}}(?:\.\d*)?\s*(?:\^|\*\*\s*[\d(])"
    r"|(?:\d{3,}|[)}\]!])\s*!(?=\s*[\\$)}\]+*/^-])"
    r"|[-+]{16}|\d[eE]\d{3}"
    r"|\\(?:[dt]?binom|choose|sum|prod|i*int|oint|lim|diff|partial|det|operatorname|exp)(?![a-z])"
)
logging.getLogger("math_verify").setLevel(logging.ERROR)  # silences its warning about the missing time limit


def read_symbolic(text: str) -> str | None:
    """Read the answer that math-verify finds, as written in the text; a number in plain notation."""
    found = _parsed(text[-MAX_LENGTH:])
    if not found:
        return None
    expression, written = (found[0], str(found[-1])) if len(found) > 1 else (found[0], str(found[0]))
    if getattr(expression, "is_Number", False):
        return written if re.fullmatch(r"-?\d+(?:\.\d+)?", written) else str(expression)
    if _is_percentage(expression) and "%" not in written:
        return rf"{written}\%"
    return written.strip() or None


def same_expression(answer: str, gold: str) -> bool:
    """True if math-verify considers two answers equal; answers too long for it are equal if their texts are."""
    if answer == gold or max(len(answer), len(gold)) > MAX_LENGTH:
        return answer == gold
    from math_verify import verify

    golds, answers = _parsed(_marked(gold)), _parsed(_marked(answer))
    return bool(golds and answers and verify(list(golds), list(answers), timeout_seconds=None))


def _marked(answer: str) -> str:
    """Mark an answer so that the library finds it: plain arithmetic on a line, anything else in a box."""
    return f"Answer: {answer}" if re.fullmatch(r"[\d\s.+*/^()-]+", answer) else rf"\boxed{{{answer}}}"


@cache
def _configuration() -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return LatexExtractionConfig(), ExprExtractionConfig()


@lru_cache(maxsize=1_024)
def _parsed(text: str) -> tuple[Any, ...]:
    """Return what math-verify parses, an expression and its text; empty if parsing might not terminate."""
    if _UNBOUNDED.search(text) or _depth(text) > MAX_DEPTH:
        return ()
    from math_verify import parse

    return tuple(parse(text, _configuration(), parsing_timeout=None))


def _depth(text: str) -> int:
    """Return the maximum nesting depth of a text's brackets."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _is_percentage(expression: Any) -> bool:
    return bool(getattr(expression, "is_Mul", False)) and str(expression).endswith("(1/100)")
