r"""Reads the quantity that a short piece of text states, as an exact number.

A model writes `18` in many ways: `**$18.00**`, `1{,}800`, `12'500`, `\frac{3}{4}`, `1 1/2`, `2 million`, `eighteen`, `x = 18`,
`3 * 6 = 18`, `2 hours 30 minutes`. Text flows through three steps:

    normalize    characters: digits of any script, widths, spaces, minus signs (for a whole output, once)
    clean        markup: LaTeX, Markdown and currency signs become plain arithmetic
    read_content clauses and numbers: the one quantity that is stated

A number is taken whole, and with everything that belongs to it. Where two readings are possible (`18 or 20`, `18-20`,
`3, 6`), the result is `UNCLEAR`; where there is no number, it is `NOTHING`. Values are exact (`Fraction`) and are compared as
canonical strings, so numbers of any length can be compared without arithmetic.

A quantity may stand for more than one number. `550 cents` is 550, or 5.5 dollars; `50%` is 50, or 0.5; `3 dozen` is 36, or
3 where one counts in dozens; `2 hours 30 minutes` is 150, or 2.5, and neither 2 nor 30.

Nothing here evaluates text. Arithmetic is limited to short numbers and small powers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

from eval_jobs.number_words import number_words
from eval_jobs.plain_text import CURRENCY, clean, normalize

MAX_LENGTH = 1_000
"""A content longer than this is read only at its ends, so time is linear in the text."""

MAX_DIGITS = 100
"""Longer numbers are compared, but not calculated with."""

MAX_POWER = 100


class Unread(Enum):
    """Why no quantity was read."""

    NOTHING = "there is no number"
    UNCLEAR = "there is more than one reading"


NOTHING, UNCLEAR = Unread.NOTHING, Unread.UNCLEAR


@dataclass(frozen=True)
class Quantity:
    """A quantity that was read.

    Attributes:
        text: a canonical spelling, which reads back as the same quantity: `18`, `3/7`, `550 cents`.
        values: the numbers it may be compared as, canonical too; the first is its own.
    """

    text: str
    values: tuple[str, ...]


class _Token(NamedTuple):
    kind: str
    text: str
    glued: bool  # nothing stands between it and the token before


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
    "mio": 10**6, "m": 10**6, "billion": 10**9, "billions": 10**9, "bn": 10**9, "b": 10**9, "trillion": 10**12, "lakh": 10**5,
    "crore": 10**7,
}  # fmt: skip
_GLUED_ONLY = {"k": "kK", "m": "M", "b": "B"}
"""Letters that multiply only where they touch the number, and only so written: `2M` is two million, `2m` two meters."""

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

_FILLERS = frozenset(
    "the a an answer final is are was be equals equal to about approximately approx around roughly exactly only just nearly "
    "almost total all altogether sum result value therefore so thus hence then would should correct usd eur gbp rs inr "
    "us cad aud sgd hkd chf maybe probably perhaps i think believe get it its it's at least most up both".split()
)
"""Words that may stand before the quantity that a clause begins with."""

_REMARKS = frozenset(
    "in for of per every out from at after with within each by on because since as when if which that while who instead "
    "rather using given where until before during left total more less fewer until through into via if including".split()
)
"""Words after which further numbers say something about the quantity, not what it is: `18 apples in 3 bags`."""

_NOT_A_QUANTITY = frozenset(
    "than over under above below not isn't aren't wasn't n't problem question step example exercise part page equation line "
    "case note option chapter section figure table version method choice task formula rule theorem exceeding beyond".split()
)
"""Words before a number that is no answer: `step 3`, `more than 18`, `not 18`."""

_REFUSALS = re.compile(
    r"\b(?:cannot|can't|can not|unknown|unclear|undetermined|insufficient|impossible|not enough|unable|don't|do not|undefined)\b"
)
_CONCLUDES = frozenset("so therefore thus hence consequently making giving leaving totaling totalling finally".split())
_TOTALS = frozenset("total sum amount profit loss maximum minimum average balance".split())
_BEFORE_QUANTITY = frozenset("about approximately roughly exactly only just around nearly almost usd".split())
_ABBREVIATIONS = frozenset("approx rs no ans sq ft in oz lb lbs mr mrs ms dr st vs e.g i.e etc".split())


def read_quantity(text: str) -> Quantity | Unread:
    """Read the quantity of a short text such as a gold answer."""
    return read_content(normalize(text))


def read_content(text: str, lead_only: bool = False) -> Quantity | Unread:
    """Read the quantity that the content of an answer states.

    Args:
        text: a line or paragraph, normalized.
        lead_only: whether it must begin with the quantity, so that prose is `NOTHING`.
    """
    if plain := _PLAIN.fullmatch(text):
        return _of_digits(plain[1], plain[2], plain[3] or "")
    head = clean(text[:MAX_LENGTH])
    sentences = _sentences(number_words(head, anywhere=not re.search(r"\d", head)))
    if not sentences:
        return NOTHING
    found = _lead(sentences[0])
    if found is not NOTHING and (len(text) <= MAX_LENGTH or len(sentences) > 1 or found is UNCLEAR):
        return found
    return NOTHING if lead_only else conclusion(text, alone=True)


def conclusion(text: str, alone: bool = False) -> Quantity | Unread:
    """Read what a paragraph of reasoning comes to: its last `so …` or `… = 18`.

    Args:
        text: the paragraph, normalized.
        alone: whether the paragraph is a whole answer, so that its only number, without either, counts too.
    """
    tail = clean(text[-MAX_LENGTH:])
    sentences = _sentences(number_words(tail, anywhere=not re.search(r"\d", tail)))
    for sentence in reversed(sentences):
        if (found := _concluded(sentence)) is not NOTHING:
            return found
    if not alone or _REFUSALS.search(tail.lower()):
        return NOTHING
    numbered = [found for sentence in sentences if (found := _prose(sentence)) is not NOTHING]
    return numbered[0] if len(numbered) == 1 else NOTHING


def begins_like_heading(text: str) -> bool:
    """Whether a text is an enumerated heading, `3. Calculate the total`, and no quantity."""
    return bool(re.match(r"[\s*_]*\d{1,2}\s*[.):]\s*[*_]*\s*[^\W\d]", text))


def canonical(value: Fraction) -> str:
    """Spell a number in the one way in which it is compared: `18`, `-0.5`, `3/7`."""
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
    """Return the quantity of one plain number, which may be of any length: no arithmetic is done with it."""
    if "," in whole and not re.fullmatch(r"\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d+,", whole):
        zero = re.fullmatch(r"0,(\d+)", whole)
        if not zero or decimals:
            return UNCLEAR
        whole, decimals = "0", "." + zero[1]
    text = (whole.replace(",", "").lstrip("0") or "0") + decimals.rstrip("0").rstrip(".")
    text = "-" + text if sign == "-" and text != "0" else text
    return Quantity(text, (text,))


def _sentences(text: str) -> list[list[_Token]]:
    """Split a cleaned text into sentences of tokens."""
    sentences: list[list[_Token]] = [[]]
    at = 0
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        token = _Token(kind, match[0], match.start() == at)
        at = match.end()
        before = sentences[-1][-1].text.lower() if sentences[-1] else ""
        if kind == "end" and not (match[0] == "." and before in _ABBREVIATIONS and sentences[-1][-1].kind == "word"):
            sentences.append([])
        elif kind != "end":
            sentences[-1].append(token)
    return [sentence for sentence in sentences if sentence]


def _clauses(tokens: Sequence[_Token]) -> list[list[_Token]]:
    """Split a sentence at commas, before words that conclude, and at a conjunction between equations."""
    clauses: list[list[_Token]] = [[]]
    for i, token in enumerate(tokens):
        word = token.text.lower()
        joins = word in ("and", "or") and any(t.kind == "equals" for t in clauses[-1]) and any(
            t.kind == "equals" for t in tokens[i:]
        )  # fmt: skip
        if token.kind == "comma" or joins:
            clauses.append([])
            continue
        if word in _CONCLUDES and clauses[-1]:
            clauses.append([])
        clauses[-1].append(token)
    return [clause for clause in clauses if clause]


def _concluded(tokens: Sequence[_Token]) -> Quantity | Unread:
    """Read the last clause of a sentence that concludes or calculates."""
    clauses = _clauses(tokens)
    for i in reversed(range(len(clauses))):
        first = clauses[i][0].text.lower()
        if first in _CONCLUDES:
            inner = [token for clause in clauses[i:] for token in [*clause, _Token("comma", ",", False)]][1:]
            found = _lead(inner[:-1]) if inner else NOTHING
            return found if found is not NOTHING else _prose(inner)
        if any(token.kind == "equals" for token in clauses[i]):
            return _lead([token for clause in clauses for token in [*clause, _Token("comma", ",", False)]][:-1])
    return NOTHING


def _lead(tokens: Sequence[_Token]) -> Quantity | Unread:
    """Read a sentence that begins with its quantity, or that is an equation; `NOTHING` if it is prose."""
    clauses = _clauses(tokens)
    if not clauses:
        return NOTHING
    for i in reversed(range(1, len(clauses))):
        if clauses[i][0].text.lower() in _CONCLUDES:
            return _concluded([token for clause in clauses[i:] for token in [*clause, _Token("comma", ",", False)]][:-1])
    first = _clause(clauses[0])
    if isinstance(first, Unread) and len(clauses) > 1 and first is NOTHING and not _has_number(clauses[0]):
        return _lead([token for clause in clauses[1:] for token in [*clause, _Token("comma", ",", False)]][:-1])
    if isinstance(first, Unread):
        return first
    calculates = _calculates(clauses[0])
    total = first
    for i, clause in enumerate(clauses[1:], 1):
        bare = clause[1:] if clause[0].text.lower() in ("and", "or", "&") else clause
        if not bare or not (bare[0].kind in ("number", "operator", "open") or _is_variable_equation(bare)):
            if clause[0].text.lower() in ("and", "or") and _has_number(clause):
                return UNCLEAR
            continue
        found = _clause(bare)
        if isinstance(found, Unread):
            return UNCLEAR
        compound = _compound([clauses[i - 1], bare]) if not calculates and i == 1 else None
        if compound is not None:
            total = compound
        elif calculates and _calculates(bare):
            total = found
        elif found.values[0] not in total.values:
            return UNCLEAR
    return total


def _clause(tokens: Sequence[_Token]) -> Quantity | Unread:
    """Read a clause that begins with its quantity, after words that say nothing, or that is an equation."""
    if any(token.kind == "equals" for token in tokens):
        return _equation(tokens)
    start = 0
    while start < len(tokens) and _is_filler(tokens, start):
        start += 1
    return _quantity_with_tail(tokens[start:])


def _is_filler(tokens: Sequence[_Token], i: int) -> bool:
    word = tokens[i].text.lower()
    if word == "in":
        return i + 1 < len(tokens) and tokens[i + 1].text.lower() in ("total", "all")
    if word == "of":
        return i > 0 and tokens[i - 1].text.lower() in _TOTALS
    return word in _FILLERS or (tokens[i].kind == "other" and word in ":~'\"|•")


def _equation(tokens: Sequence[_Token]) -> Quantity | Unread:
    """Read `3 * 6 = 18`, `18 = 3 * 6`, `x = 18`: the side that is a number, not a calculation."""
    sides: list[list[_Token]] = [[]]
    for token in tokens:
        if token.kind == "equals":
            sides.append([])
        else:
            sides[-1].append(token)
    filled = [side for side in sides if side]
    if not filled:
        return NOTHING
    if len(sides) > 1 and not sides[-1]:
        return UNCLEAR  # cut before the result
    last = _clause(filled[-1])
    if isinstance(last, Quantity) and not _has_operator(filled[-1]):
        first = _clause(filled[0])
        rounded = any(token.text == "≈" for token in tokens)
        if len(filled) == 2 and isinstance(first, Quantity) and not _has_operator(filled[0]) and not rounded:
            same = set(first.values) & set(last.values)
            return last if same or not _is_bare(filled[0]) else UNCLEAR
        return last
    first = _clause(filled[0])
    if isinstance(first, Quantity) and not _has_operator(filled[0]):
        return first
    if isinstance(last, Quantity):
        return last
    prose = _prose(filled[-1])
    return UNCLEAR if prose is NOTHING and _has_number(tokens) else prose


def _quantity_with_tail(tokens: Sequence[_Token]) -> Quantity | Unread:
    """Read a quantity at the beginning, and make sure that what follows does not change it."""
    parser = _Parser(tokens)
    found = parser.quantity()
    if isinstance(found, Unread):
        return found
    return found if _tail_is_harmless(tokens, parser.at, found) else UNCLEAR


def _tail_is_harmless(tokens: Sequence[_Token], at: int, found: Quantity) -> bool:
    rest = list(tokens[at:])
    if not rest:
        return True
    head, after = rest[0], rest[1] if len(rest) > 1 else None
    word_after = after is not None and after.kind == "word" and len(after.text) > 1
    if head.kind == "command" or (head.kind in ("operator", "dash") and not (head.text in "-/–—" and word_after)):
        return head.text in "-+" and after is None
    if head.kind == "word" and head.glued and head.text in ("x", "y", "z", "n", "i", "π", "pi"):
        return False
    if head.kind in ("other", "percent") and head.text in "<>≤≥≠±:√π∞" and head.text != "%":
        return head.text == ":" and not _has_number(rest)
    words: list[str] = []
    for i, token in enumerate(rest):
        if token.kind == "number" and not (token.glued and i and rest[i - 1].kind == "word"):
            if words and words[-1] in _NOT_A_QUANTITY:
                continue
            if words and words[-1] in ("and", "or", "to", "&", "plus", "minus", "versus", "vs"):
                other = _quantity_with_tail(rest[i:])
                return isinstance(other, Quantity) and other.values[0] in found.values
            return any(word in _REMARKS for word in words)
        if token.kind in ("word", "other", "operator", "dash"):
            words.append(token.text.lower())
            if token.kind == "word" and token.text.lower() in _REMARKS:
                return True
    return True


def _compound(parts: Sequence[Sequence[_Token]]) -> Quantity | None:
    parser = _Parser([token for part in parts for token in part])
    found = parser.quantity()
    return found if isinstance(found, Quantity) and parser.parts > 1 and not parser.rest_has_number() else None


def _prose(tokens: Sequence[_Token]) -> Quantity | Unread:
    """Read a sentence in which only one number can be what is asked for: `In 3 days she picks 18 apples.`"""
    at = [i for i, token in enumerate(tokens) if token.kind == "number" and not _is_named(tokens, i)]
    at = [i for i in at if _word_before(tokens, i) not in _NOT_A_QUANTITY]
    if any(_is_one_of_several(tokens, i) for i in at):
        return UNCLEAR
    starts = [i for i in at if i == 0 or tokens[i - 1].kind != "operator" or tokens[i - 1].text == "-"]
    if len(at) != len(starts):
        return UNCLEAR
    free = [i for i in starts if not _is_about_something(tokens, i)] if len(starts) > 1 else starts
    found: dict[str, Quantity] = {}
    skip = -1
    for i in free:
        if i < skip:
            continue
        start = i - 1 if i and tokens[i - 1].text in ("-", "(") and not (i > 1 and tokens[i - 2].kind == "number") else i
        if start and tokens[start - 1].text.lower() in ("minus", "negative"):
            start -= 1
        parser = _Parser(tokens[start:])
        value = parser.quantity()
        if isinstance(value, Unread) or not _tail_is_harmless(tokens[start:], parser.at, value):
            return UNCLEAR
        skip = start + parser.at
        found[value.text] = value
    if len(found) > 1:
        return UNCLEAR
    return next(iter(found.values()), NOTHING)


def _is_one_of_several(tokens: Sequence[_Token], i: int) -> bool:
    """Whether the number at `i` is the end of a range or alternative (`18 to 20`), or only a bound (`> 18`, `±3`, `- 18`)."""
    before = tokens[i - 1] if i else None
    if before is None:
        return False
    if before.kind == "other" and before.text in "±<>≤≥≠√":
        return True
    if before.text == "-" and i == 1 and not tokens[i].glued:
        return True
    return i > 1 and tokens[i - 2].kind == "number" and (before.kind == "dash" or before.text.lower() in ("to", "or", "and"))


def _is_about_something(tokens: Sequence[_Token], i: int) -> bool:
    """Whether the number at `i` follows a preposition, as in `of 6`, but not as in `a total of 18`."""
    word = _word_before(tokens, i)
    return word in _REMARKS and not (word == "of" and _word_before(tokens, i - 1) in _TOTALS)


def _word_before(tokens: Sequence[_Token], i: int) -> str:
    place = i - 1
    while place >= 0 and (tokens[place].kind in ("operator", "open") or tokens[place].text.lower() in _BEFORE_QUANTITY):
        place -= 1
    return tokens[place].text.lower() if place >= 0 and tokens[place].kind == "word" else ""


def _is_named(tokens: Sequence[_Token], i: int) -> bool:
    """Whether the number at `i` is part of a name: `A1`, `m2`."""
    return tokens[i].glued and i > 0 and tokens[i - 1].kind == "word"


def _has_number(tokens: Sequence[_Token]) -> bool:
    return any(token.kind == "number" and not _is_named(tokens, i) for i, token in enumerate(tokens))


def _has_operator(tokens: Sequence[_Token]) -> bool:
    """Whether a side of an equation calculates: two numbers with an operator between them that is not a fraction's."""
    numbers = [i for i, token in enumerate(tokens) if token.kind == "number"]
    plain_fraction = len(numbers) == 2 and tokens[numbers[0] + 1].text == "/" and numbers[1] == numbers[0] + 2
    return len(numbers) > 1 and not plain_fraction and any(token.kind == "operator" for token in tokens)


def _is_bare(tokens: Sequence[_Token]) -> bool:
    return all(token.kind in ("number", "operator", "percent", "cent") for token in tokens)


def _calculates(tokens: Sequence[_Token]) -> bool:
    place = next((i for i, token in enumerate(tokens) if token.kind == "equals"), None)
    return place is not None and _has_number(tokens[:place])


def _is_variable_equation(tokens: Sequence[_Token]) -> bool:
    place = next((i for i, token in enumerate(tokens) if token.kind == "equals"), None)
    return place is not None and not _has_number(tokens[:place])


class _Parser:
    """Reads a quantity from the beginning of a list of tokens.

    Attributes:
        at: the place after what was read.
        parts: how many numbers with units were added up, as in `2 hours 30 minutes`.
    """

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.parts = 0

    def quantity(self) -> Quantity | Unread:
        """Read an expression with its unit, and further ones with smaller units."""
        start = self.at
        if self._kind() == "number" and (plain := self._long_number()):
            return plain
        value = self._sum()
        if value is None:
            self.at = start
            return UNCLEAR if self._kind() in ("number", "operator") and _has_number(self.tokens) else NOTHING
        if self._is_range(start):
            return UNCLEAR
        self.parts = 1
        text = canonical(value)
        if self._kind() == "percent" or self._word() in ("percent", "pct"):
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
        """Whether numbers follow that were not read."""
        return _has_number(self.tokens[self.at :])

    def _is_range(self, start: int) -> bool:
        """Whether `18-20` or `18 - 20` was read, which is a range as well as a difference."""
        read = [token for token in self.tokens[start : self.at] if token.kind not in ("open", "close")]
        if [token.kind for token in read] != ["number", "operator", "number"] or read[1].text != "-":
            return False
        one, other = _fraction(read[0].text), _fraction(read[2].text)
        return one is None or other is None or one <= other or (read[1].glued and read[2].glued)

    def _token(self, ahead: int = 0) -> _Token | None:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def _kind(self, ahead: int = 0) -> str:
        token = self._token(ahead)
        return token.kind if token else ""

    def _text(self, ahead: int = 0) -> str:
        token = self._token(ahead)
        return token.text if token else ""

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
            after = self._token(1)
            # `- 18` with a space is a dash as well as a sign.
            if self._kind() != "word" and (after is None or not after.glued):
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
        if value is None or (self._kind() == "number" and self._token(0).glued):  # type: ignore[union-attr]
            return None
        if whole and (mixed := self._mixed()) is not None:
            return value + mixed
        return self._multiplied(value)

    def _mixed(self) -> Fraction | None:
        """Read the fraction of a mixed number: ` 1/2`, ` and 1/2`, `-1/2`."""
        ahead = 1 if self._word() == "and" or self._text() == "&" or (self._text() == "-" and self._token().glued) else 0  # type: ignore[union-attr]
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
            if letter is not None and not (self._token().glued and self._text() in letter):  # type: ignore[union-attr]
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

    def _unit(self) -> _Unit | None:
        if self._kind() == "cent":
            self.at += 1
            return _UNITS["cents"]
        unit = _UNITS.get(self._word())
        if unit is None or (len(self._word()) == 1 and not self._token().glued and self._word() not in "hms"):  # type: ignore[union-attr]
            return None
        self.at += 1
        return unit

    def _smaller_part(self, unit: _Unit) -> tuple[Fraction, _Unit] | None:
        """Read `and 30 minutes` after hours; leaves what is no such part."""
        start = self.at
        if self._kind() == "comma":
            self.at += 1
        if self._word() == "and":
            self.at += 1
        if self._kind() == "number":
            value = _fraction(self._text())
            self.at += 1
            smaller = self._unit()
            if value is not None and smaller and smaller.dimension == unit.dimension and smaller.size < unit.size:
                return value, smaller
        self.at = start
        return None


def _fraction(text: str) -> Fraction | None:
    """Return the value of a number as it is written; None if it is too long to calculate with."""
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


__all__ = ["CURRENCY", "NOTHING", "UNCLEAR", "Quantity", "Unread", "canonical", "clean", "normalize", "read_content"]
