r"""Parses an exact number and its unit from the beginning of a cleaned text's tokens.

Grammar: sums, products and powers of numbers in any usual notation (`1,234.50`, `12 500`, `1 1/2`, `2e3`), multiplied by
words (`2 million`) and followed by a unit, or by several of one dimension (`2 hours 30 minutes`). Values are exact and
compared as canonical strings; numbers too long to calculate with can still be compared. No text is evaluated: numbers and
powers are bounded.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 100
"""Maximum digits of numbers in calculations; longer ones are only compared."""

MAX_POWER = 100


class Unread(Enum):
    """Why no quantity was read."""

    NOTHING = "there is no number"
    UNCLEAR = "there is more than one reading"


NOTHING, UNCLEAR = Unread.NOTHING, Unread.UNCLEAR


@dataclass(frozen=True)
class Quantity:
    """A parsed quantity."""

    text: str
    """Canonical notation, which parses to the same quantity: `18`, `3/7`, `550 cents`."""
    values: tuple[str, ...]
    """Canonical values that it may be compared as; the first is its own."""


class Token(NamedTuple):
    """A word, number or sign."""

    kind: str
    text: str
    glued: bool  # nothing stands between it and the token before


_END = Token("", "", False)


class _Unit(NamedTuple):
    dimension: str
    size: int
    name: str


_NUMBER = (
    r"\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?"  # 1,234.50
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,]*\d)(?:\.\d+)?"  # 12,34,567
    r"|\d{1,3}(?:\.\d{3})+,\d+(?![\d,.]*\d)"  # 1.234,50
    r"|\d{1,3}(?:\.\d{3}){2,}(?![\d.]*\d)"  # 1.234.567
    r"|\d{1,3}(?:'\d{3})+(?![\d']*\d)(?:\.\d+)?"  # 12'500
    r"|\d{1,3}(?: \d{3})+(?! ?\d)(?:[.,]\d+)?(?! ?[\d/])"  # 12 500
    r"|\d{1,3}(?:_\d{3})+(?![\d_])(?:\.\d+)?"  # 12_500
    r"|0,\d+(?![\d,.]*\d)"  # 0,5
    r"|\d+(?:\.\d+)?|\.\d+"
)
_TOKEN = re.compile(
    rf"(?P<number>(?:{_NUMBER})(?:[eE][-+]?\d{{1,3}}(?![\w.]))?)|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)?)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<operator>[-+*/^])|(?P<open>\()|(?P<close>\))|(?P<equals>[=≈→])|(?P<end>[.!?]+(?=\s|$)|\n)|(?P<comma>[,;])"
    r"|(?P<dash>[–—])|(?P<percent>%)|(?P<cent>¢)|(?P<other>\S)"
)
_PLAIN = re.compile(r"[*_`\s]*([-+]?)\$?([0-9][0-9,]*)(\.[0-9]+)?\.?[*_`\s]*")

_MULTIPLIERS = {
    "hundred": 10**2, "thousand": 10**3, "thousands": 10**3, "k": 10**3, "million": 10**6, "millions": 10**6, "mn": 10**6,
    "mio": 10**6, "mil": 10**6, "m": 10**6, "billion": 10**9, "billions": 10**9,
    "bn": 10**9, "b": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7,
}  # fmt: skip
_GLUED_ONLY = {"k": "kK", "m": "M", "b": "B"}
"""Letters that multiply only if they touch the number, in this case: `2M` is two million, `2m` two meters."""

_UNITS = {
    name: _Unit(dimension, size, names[0])
    for dimension, size, names in (
        ("time", 1, ("seconds", "second", "secs", "sec", "s")),
        ("time", 60, ("minutes", "minute", "mins", "min", "m")),
        ("time", 3_600, ("hours", "hour", "hrs", "hr", "h")),
        ("time", 86_400, ("days", "day", "d")),
        ("time", 604_800, ("weeks", "week", "wks", "wk")),
        ("calendar", 1, ("months", "month")),
        ("calendar", 12, ("years", "year", "yrs", "yr")),
        ("money", 1, ("cents", "cent", "¢")),
        ("money", 100, ("dollars", "dollar", "bucks", "usd", "euros", "euro", "eur")),
        ("sterling", 1, ("pence", "penny", "p")),
        ("sterling", 100, ("quid", "gbp")),
        ("length", 1, ("inches", "inch")),
        ("length", 12, ("feet", "foot", "ft")),
        ("length", 36, ("yards", "yard", "yd")),
        ("metric length", 1, ("millimeters", "mm")),
        ("metric length", 10, ("centimeters", "centimeter", "cm")),
        ("metric length", 1_000, ("meters", "meter", "metres", "metre")),
        ("metric length", 1_000_000, ("kilometers", "kilometer", "km")),
        ("weight", 1, ("ounces", "ounce", "oz")),
        ("weight", 16, ("pounds", "pound", "lbs", "lb")),
        ("metric weight", 1, ("grams", "gram", "g")),
        ("metric weight", 1_000, ("kilograms", "kilogram", "kg")),
    )
    for name in names
}  # fmt: skip


_PARTS = {
    "length": {"in": _UNITS["inches"]},
    "metric length": {"m": _UNITS["meters"]},
}
"""Words and letters that are units only after a larger unit of the same dimension."""


def tokens_of(text: str) -> Iterator[Token]:
    """Yield a cleaned text's tokens."""
    at = 0
    for match in _TOKEN.finditer(text):
        yield Token(str(match.lastgroup), match[0], match.start() == at)
        at = match.end()


def read_plain(text: str) -> Quantity | Unread | None:
    """Parse a text that consists of one number in digits, of any length; None if it does not."""
    plain = _PLAIN.fullmatch(text)
    return _of_digits(plain[1], plain[2], plain[3] or "") if plain else None


def canonical(value: Fraction) -> str:
    """Return the canonical notation of a number: `18`, `-0.5`, `3/7`."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :].rstrip("0")
    return ("-" if value < 0 else "") + whole + ("." + decimals if decimals else "")


def _of_digits(sign: str, whole: str, decimals: str) -> Quantity | Unread:
    """Return the quantity of a plain number of any length, without arithmetic."""
    if "," in whole and not re.fullmatch(r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d+,", whole):
        zero = re.fullmatch(r"0,(\d+)", whole)
        if not zero or decimals:
            return UNCLEAR
        whole, decimals = "0", "." + zero[1]
    text = (whole.replace(",", "").lstrip("0") or "0") + decimals.rstrip("0").rstrip(".")
    text = "-" + text if sign == "-" and text != "0" else text
    return Quantity(text, (text,))


def is_named(tokens: Sequence[Token], i: int) -> bool:
    """True if the number at `i` is part of a name: `A1`, `m2`."""
    return tokens[i].glued and i > 0 and tokens[i - 1].kind == "word"


def has_number(tokens: Sequence[Token]) -> bool:
    """True if there is a number that is not part of a name."""
    return any(token.kind == "number" and not is_named(tokens, i) for i, token in enumerate(tokens))


class QuantityParser:
    """Parses a quantity at the beginning of a list of tokens.

    Attributes:
        at: index after the parsed tokens.
        parts: how many numbers with units were added up, as in `2 hours 30 minutes`.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.parts = 0

    def quantity(self) -> Quantity | Unread:
        """Parse an expression with its unit, and further parts with smaller units."""
        start = self.at
        if self._kind() == "number" and (plain := self._long_number()):
            return plain
        value = self._sum()
        if value is None:
            self.at = start
            return UNCLEAR if self._kind() in ("number", "operator") and has_number(self.tokens) else NOTHING
        if self._is_range(start):
            return UNCLEAR
        self.parts = 1
        text = canonical(value)
        if self._kind() == "percent" or self._word() in ("percent", "pct"):
            if any(token.kind == "operator" and token.text in "*+^" for token in self.tokens[start : self.at]):
                return UNCLEAR  # `24 * 75%`
            self.at += 1
            return Quantity(f"{text}%", (text, canonical(value / 100)))
        if self._word() in ("dozen", "dozens"):
            self.at += 1
            return Quantity(f"{text} dozen", (canonical(value * 12), text))
        unit = self._unit()
        if unit is None:
            return Quantity(text, (text,))
        total, units, spelled = value * unit.size, [unit], [f"{text} {unit.name}"]
        while (part := self._smaller_part(units[-1])) is not None:
            total += (part[0] if value >= 0 else -part[0]) * part[1].size
            units.append(part[1])
            spelled.append(f"{canonical(part[0])} {part[1].name}")
            self.parts += 1
        if len(units) > 1:
            return Quantity(" ".join(spelled), tuple(canonical(total / unit.size) for unit in reversed(units)))
        if unit.name == "cents":
            return Quantity(spelled[0], (text, canonical(value / 100)))
        return Quantity(text, (text,))

    def rest_has_number(self) -> bool:
        """True if unparsed numbers follow."""
        return has_number(self.tokens[self.at :])

    def _is_range(self, start: int) -> bool:
        """True if `18-20` or `18 - 20` was parsed, which is a range as well as a difference."""
        read = [token for token in self.tokens[start : self.at] if token.kind not in ("open", "close")]
        if [token.kind for token in read] != ["number", "operator", "number"] or read[1].text != "-":
            return False
        one, other = _fraction(read[0].text), _fraction(read[2].text)
        return one is None or other is None or one <= other or (read[1].glued and read[2].glued)

    def _token(self, ahead: int = 0) -> Token:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else _END

    def _kind(self, ahead: int = 0) -> str:
        return self._token(ahead).kind

    def _text(self, ahead: int = 0) -> str:
        return self._token(ahead).text

    def _word(self, ahead: int = 0) -> str:
        return self._text(ahead).lower() if self._kind(ahead) == "word" else ""

    def _long_number(self) -> Quantity | None:
        digits = self._text()
        if len(digits) <= MAX_DIGITS:
            return None
        plain = _PLAIN.fullmatch(digits)
        found = _of_digits("", plain[2], plain[3] or "") if plain else UNCLEAR
        self.at += 1
        return found if isinstance(found, Quantity) else None

    def _sum(self) -> Fraction | None:
        total = self._product()
        while total is not None and self._text() in ("+", "-") and self._starts_number(1):
            operator = self._text()
            self.at += 1
            term = self._product()
            if term is None:
                return None
            total = _bounded(total + term if operator == "+" else total - term)
        return total

    def _product(self) -> Fraction | None:
        total = self._factor()
        divided = False
        while total is not None and (self._text() in ("*", "/", "x", "X")) and self._starts_number(1):
            operator = self._text()
            if operator == "/" and divided:  # a date
                return None
            divided = operator == "/"
            self.at += 1
            factor = self._factor()
            if factor is None or (operator == "/" and factor == 0):
                return None
            total = _bounded(total / factor if operator == "/" else total * factor)
        return total

    def _starts_number(self, ahead: int) -> bool:
        if self._kind(ahead) == "operator" and self._text(ahead) in "+-":
            ahead += 1
        return self._kind(ahead) in ("number", "open")

    def _factor(self) -> Fraction | None:
        sign = 1
        if self._text() in ("-", "–") or self._word() in ("minus", "negative"):
            if self._kind() != "word" and not self._token(1).glued:  # `- 18` is a dash as well as a sign
                return None
            sign = -1
            self.at += 1
        elif self._text() == "+":
            self.at += 1
        base = self._base()
        if base is None:
            return None
        if self._text() == "^" and self._starts_number(1):
            self.at += 1
            exponent = self._factor()
            if exponent is None:
                return None
            base = _power(base, exponent)
        return None if base is None else sign * base

    def _base(self) -> Fraction | None:
        if self._kind() == "open":
            self.at += 1
            inner = self._sum()
            if inner is None or self._kind() != "close":
                return None
            self.at += 1
            return inner
        if self._kind() != "number":
            return None
        value = _fraction(self._text())
        whole = "." not in self._text()
        self.at += 1
        if value is None or (self._kind() == "number" and self._token().glued):
            return None
        if whole and (mixed := self._mixed()) is not None:
            return value + mixed
        return self._multiplied(value)

    def _mixed(self) -> Fraction | None:
        """Read the fraction of a mixed number: ` 1/2`, ` and 1/2`, `-1/2`."""
        ahead = (
            1 if self._word() == "and" or self._text() == "&" or (self._text() == "-" and self._token().glued) else 0
        )
        ahead += self._kind(ahead) == "open"
        if [self._kind(ahead), self._text(ahead + 1), self._kind(ahead + 2)] != ["number", "/", "number"]:
            return None
        over, under = self._text(ahead), self._text(ahead + 2)
        if not (over.isdigit() and under.isdigit()) or len(over + under) > MAX_DIGITS or not 0 < int(over) < int(under):
            return None
        self.at += ahead + 3
        self.at += self._kind() == "close"
        return Fraction(int(over), int(under))

    def _multiplied(self, value: Fraction) -> Fraction | None:
        while (word := self._word()) in _MULTIPLIERS:
            letter = _GLUED_ONLY.get(word)
            if letter is not None and not (self._token().glued and self._text() in letter):
                break
            value *= _MULTIPLIERS[word]
            self.at += 1
            # `2 million 500 thousand`
            following = _MULTIPLIERS.get(self._word(1)) if self._kind() == "number" else None
            if following is not None and following < _MULTIPLIERS[word]:
                smaller = _fraction(self._text())
                if smaller is None:
                    return None
                self.at += 2
                value += smaller * following
        return _bounded(value)

    def _unit(self, dimension: str | None = None) -> _Unit | None:
        """Parse a unit; for a part of a larger quantity, the dimension disambiguates letters."""
        if self._kind() == "cent":
            self.at += 1
            return _UNITS["cents"]
        if dimension is not None:
            self.at += 1
            return _PARTS.get(dimension, {}).get(self._word(-1)) or _UNITS.get(self._word(-1))
        unit = _UNITS.get(self._word())
        if unit is None or (len(self._word()) == 1 and not self._token().glued and self._word() not in "hms"):
            return None
        self.at += 1
        return unit

    def _smaller_part(self, unit: _Unit) -> tuple[Fraction, _Unit] | None:
        """Parse a smaller part such as `and 30 minutes` after hours; leaves other tokens unparsed."""
        start = self.at
        if self._kind() == "comma":
            self.at += 1
        if self._word() == "and":
            self.at += 1
        if self._kind() == "number":
            value = _fraction(self._text())
            self.at += 1
            smaller = self._unit(unit.dimension)
            if value is not None and smaller and smaller.dimension == unit.dimension and smaller.size < unit.size:
                return value, smaller
        self.at = start
        return None


def _fraction(text: str) -> Fraction | None:
    """Return the value of a number as written; None if it is too long to calculate with."""
    if len(text) > MAX_DIGITS:
        return None
    digits, _, exponent = text.lower().partition("e")
    digits = digits.replace(" ", "").replace("'", "").replace("_", "")
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+", digits):
        digits = digits.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", digits):
        digits = digits.replace(".", "")
    elif re.fullmatch(r"0,\d+|\d+,\d{1,2}", digits):
        digits = digits.replace(",", ".")
    digits = digits.replace(",", "")
    if exponent and abs(int(exponent)) > MAX_DIGITS:
        return None
    return Fraction(digits) * Fraction(10) ** int(exponent or 0)


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1 or abs(exponent) > MAX_POWER or (base == 0 and exponent < 0):
        return None
    if len(str(base.numerator)) * abs(int(exponent)) > 3 * MAX_DIGITS or base.denominator > 10**MAX_DIGITS:
        return None
    return _bounded(Fraction(base ** int(exponent)))


def _bounded(value: Fraction) -> Fraction | None:
    limit = 10 ** (3 * MAX_DIGITS)
    return value if abs(value.numerator) < limit and value.denominator < limit else None
