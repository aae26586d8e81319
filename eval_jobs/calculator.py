"""The calculator tool: arithmetic as models write it, on exact numbers, with bounded time and memory.

simpleeval parses and evaluates the expression, never Python's `eval`; only numbers, arithmetic and a few functions are
allowed. Every operation rejects a result of more than `MAX_BITS` bits before computing it, so `9**9**9` returns "too large"
at once. Errors are returned as texts that the model can act on.
"""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from simpleeval import InvalidExpression, SimpleEval

MAX_CHARACTERS = 500
MAX_BITS = 4_096
MAX_FACTORIAL = 500
MAX_DIGITS = 50
"""Maximum digits to round to: Python would compute 10 to that power."""
TOO_LARGE = "error: too large"

Number = int | float

_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%(?!\s*[0-9(.])")
_TIMES = re.compile(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**", "$": None, "€": None, "£": None})


class _TooLargeError(Exception):
    """A result is too large to compute."""


def calculate(expression: str) -> str:
    """Evaluate an expression; return the result, or `error: …` with the reason.

    Examples: `2 * (3 + 4)`, `3,600 / 12`, `20% * 50`, `2^10`, `5 x 3`, `sqrt(2)`, `max(3, 4)`. Integers are exact; other
    numbers have 12 significant digits.
    """
    if len(expression) > MAX_CHARACTERS:
        return f"{TOO_LARGE}: more than {MAX_CHARACTERS} characters"
    if ";" in expression or "\n" in expression.strip():
        return "error: more than one expression"
    text = _PERCENT.sub(r"(\1/100)", _THOUSANDS.sub("", expression).translate(_SIGNS))
    try:
        return _spell(_evaluator().eval(_TIMES.sub("*", text).strip().rstrip("= ")))
    except (_TooLargeError, OverflowError):
        return TOO_LARGE
    except (RecursionError, MemoryError):
        return f"{TOO_LARGE}: too deeply nested"
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, InvalidExpression, TypeError, ValueError, KeyError) as error:
        return f"error: {str(error).splitlines()[0] if str(error) else 'not an expression'}"


def _evaluator() -> SimpleEval:
    evaluator = SimpleEval(operators=_OPERATORS, functions=_FUNCTIONS, names={"pi": math.pi, "e": math.e})
    allowed = (ast.Expr, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name)
    evaluator.nodes = {kind: visit for kind, visit in evaluator.nodes.items() if kind in allowed}
    return evaluator


def _spell(value: Any) -> str:
    value = _number(value)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return TOO_LARGE
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"


def _number(value: Any) -> Number:
    """Return a value if it is a number of allowed size.

    Raises:
        TypeError: if it is not a real number.
        _TooLargeError: if it has too many digits.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("only real numbers are allowed")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _TooLargeError
    return value


def _checked(function: Callable[..., Any]) -> Callable[..., Number]:
    """Wrap a function so that its arguments and result are numbers of bounded size."""

    def checked(*values: Any) -> Number:
        return _number(function(*map(_number, values)))

    return checked


def _power(base: Number, exponent: Number) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > 2 * MAX_BITS:
        if abs(base) <= 1:
            return base**exponent
        raise _TooLargeError
    return base**exponent


def _factorial(n: Number) -> int:
    if n > MAX_FACTORIAL:
        raise _TooLargeError
    if n < 0 or n != int(n):
        raise ValueError("factorial is of whole numbers that are not negative")
    return math.factorial(int(n))


def _round(value: Number, digits: Number = 0) -> Number:
    if abs(digits) > MAX_DIGITS:
        raise _TooLargeError
    return round(value, int(digits)) if digits else round(value)


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: _checked(operator.add),
    ast.Sub: _checked(operator.sub),
    ast.Mult: _checked(operator.mul),
    ast.Div: _checked(operator.truediv),
    ast.FloorDiv: _checked(operator.floordiv),
    ast.Mod: _checked(operator.mod),
    ast.Pow: _checked(_power),
    ast.USub: _checked(operator.neg),
    ast.UAdd: _checked(operator.pos),
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": _checked(abs),
    "ceil": _checked(math.ceil),
    "exp": _checked(math.exp),
    "factorial": _checked(_factorial),
    "floor": _checked(math.floor),
    "gcd": _checked(math.gcd),
    "lcm": _checked(math.lcm),
    "log": _checked(math.log),
    "log10": _checked(math.log10),
    "max": _checked(max),
    "min": _checked(min),
    "round": _checked(_round),
    "sqrt": _checked(math.sqrt),
}
