r"""Reads the quantity stated by a short text, as an exact number.

A model writes `18` in many ways: `**$18.00**`, `1{,}800`, `12'500`, `\frac{3}{4}`, `1 1/2`, `2 million`, "eighteen", `x =
18`, `3 * 6 = 18`, `2 hours 30 minutes`. A text passes through three steps:

    normalize    characters: digits of any script, widths, spaces, minus signs (once per output)
    clean        markup: LaTeX, Markdown and currency signs become plain arithmetic
    read_content clauses and numbers: the one quantity that is stated

A number is always read completely, with everything that belongs to it. If two readings are possible (`18 or 20`, `18-20`,
`3, 6`), the result is `UNCLEAR`; without a number it is `NOTHING`. Values are exact (`Fraction`) and are compared as
canonical strings, so numbers of any length can be compared without arithmetic.

A quantity may have several numeric values. `550 cents` is 550, or 5.5 dollars; `50%` is 50, or 0.5; `3 dozen` is 36, or 3
if counted in dozens; `2 hours 30 minutes` is 150, or 2.5, and neither 2 nor 30.

No text is evaluated. Arithmetic is limited to short numbers and small powers.
"""

import re
from collections.abc import Sequence
from itertools import pairwise, takewhile

from eval_jobs.exact_numbers import (
    NOTHING,
    UNCLEAR,
    Quantity,
    QuantityParser,
    Token,
    Unread,
    has_number,
    is_named,
    read_plain,
    tokens_of,
)
from eval_jobs.number_words import number_words
from eval_jobs.plain_text import clean, normalize

MAX_LENGTH = 1_000
"""Maximum length of a content that is read completely; of longer ones only the ends are read, so time is linear."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILLERS = _words(
    "solution conclusion the a an answer final is are was be equals equal to about approximately approx around roughly exactly "
    "only just nearly almost total all altogether sum result value therefore so thus hence then would should correct "
    "usd eur gbp rs inr us cad aud sgd hkd chf maybe probably perhaps i think believe get it its it's at least "
    "most up both"
)
"""Words that may precede the quantity at the beginning of a clause."""

_REMARKS = _words(
    "in for of per every out from at after with within each by on because since as when if which that while who "
    "instead rather using given where until before during left total more less fewer until through into via if "
    "including"
)
"""Words after which further numbers describe the quantity instead of stating it: `18 apples in 3 bags`."""

_NOT_A_QUANTITY = _words(
    "than over under above below not isn't aren't wasn't n't problem question step example exercise part page "
    "equation line case note option chapter section figure table version method choice task formula rule theorem "
    "exceeding beyond"
)
"""Words before a number that is not an answer: `step 3`, `more than 18`, `not 18`."""

_REFUSALS = re.compile(
    r"\b(?:cannot|can't|can not|unknown|unclear|undetermined|insufficient|impossible|not enough|unable"
    r"|don't|do not|undefined)\b"
)
_CONCLUDES = _words("so therefore thus hence consequently making giving leaving totaling totalling finally")
_COPULAS = _words("is are was were equals makes make gives totals")
_VARIABLES = _words("x y z n i π pi")
_SHARES = _words("half third thirds quarter quarters fourth fifth twice")
_SUPPOSES = _words("let if suppose assume given where when say")
_TOTALS = _words("total sum amount profit loss maximum minimum average balance")
_BEFORE_QUANTITY = _words(
    "the her his their these those all about approximately roughly exactly only just around nearly almost usd"
)
_ABBREVIATIONS = _words("approx rs no ans sq ft in oz lb lbs mr mrs ms dr st vs e.g i.e etc")


def read_quantity(text: str) -> Quantity | Unread:
    """Read the quantity of a short text, such as a gold answer."""
    return read_content(normalize(text))


def read_content(text: str, lead_only: bool = False) -> Quantity | Unread:
    """Read the quantity stated by the content of an answer.

    Args:
        text: a line or paragraph, normalized.
        lead_only: True if the text must begin with the quantity, so that prose is `NOTHING`.
    """
    if (plain := read_plain(text)) is not None:
        return plain
    head = clean(text[:MAX_LENGTH])
    sentences = _sentences(number_words(head, anywhere=not re.search(r"\d", head)))
    if not sentences:
        return NOTHING
    found = _lead(sentences[0])
    if found is not NOTHING and (len(text) <= MAX_LENGTH or len(sentences) > 1 or found is UNCLEAR):
        return found
    return NOTHING if lead_only else conclusion(text, alone=True)


def conclusion(text: str, alone: bool = False) -> Quantity | Unread:
    """Read the conclusion of a paragraph of reasoning: its last `so …` or `… = 18`.

    Args:
        text: the paragraph, normalized.
        alone: True if the paragraph is a whole answer, so that its only number counts even without a conclusion.
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


def same_quantity(answer: str, gold: str) -> bool:
    """True if an answer equals the gold answer: equal values; gold answers without a quantity are compared as text."""
    here, there = read_quantity(answer), read_quantity(gold)
    if isinstance(here, Quantity) and isinstance(there, Quantity):
        return here.values[0] in there.values or there.values[0] in here.values
    return normalize(answer).casefold().split() == normalize(gold).casefold().split()


def begins_like_heading(text: str) -> bool:
    """True if a text is an enumerated heading, `3. Calculate the total`, and not a quantity."""
    return bool(re.match(r"[\s*_]*\d{1,2}\s*[.):]\s*[*_]*\s*[^\W\d]", text))


def _sentences(text: str) -> list[list[Token]]:
    """Split a cleaned text into sentences of tokens."""
    sentences: list[list[Token]] = [[]]
    for token in tokens_of(text):
        before = sentences[-1][-1].text.lower() if sentences[-1] else ""
        if token.kind != "end":
            sentences[-1].append(token)
        elif token.text != "." or before not in _ABBREVIATIONS:
            sentences.append([])
    sentences = [_with_copula(sentence) for sentence in sentences]
    return [sentence for sentence in sentences if sentence]


def _with_copula(tokens: list[Token]) -> list[Token]:
    """Convert a verb between two quantities to an equation: `3 bags of 6 is 18`."""
    for i in reversed(range(1, len(tokens))):
        if tokens[i].text.lower() not in _COPULAS:
            continue
        comma = max((place for place in range(i) if tokens[place].kind == "comma"), default=-1)
        subject = tokens[comma + 1 : i]
        if has_number(subject) and not {"and", "or", "but"} & {*_texts(subject)}:
            after = _skip_fillers(tokens, i + 1)
            if after < len(tokens) and tokens[after].kind == "number":
                return [*tokens[:i], Token("equals", "=", False), *tokens[after:]]
    return tokens


def _clauses(tokens: Sequence[Token]) -> list[list[Token]]:
    """Split a sentence at commas, before words that conclude, and at a conjunction between equations."""
    clauses: list[list[Token]] = [[]]
    for i, token in enumerate(tokens):
        word = token.text.lower()
        joins = word in ("and", "or") and _has_equals(clauses[-1]) and _has_equals(tokens[i:])
        if token.kind == "comma" or joins:
            clauses.append([])
            continue
        if word in _CONCLUDES and clauses[-1]:
            clauses.append([])
        clauses[-1].append(token)
    return [clause for clause in clauses if clause]


def _concluded(tokens: Sequence[Token]) -> Quantity | Unread:
    """Read the last clause of a sentence that concludes or calculates."""
    clauses = _clauses(tokens)
    for i in reversed(range(len(clauses))):
        first = clauses[i][0].text.lower()
        if first in _CONCLUDES:
            inner = _joined(clauses[i:])[1:]
            found = _lead(inner)
            return found if found is not NOTHING else _prose([*inner, Token("comma", ",", False)])
        if _has_equals(clauses[i]):
            if i and _calculates(clauses[i]) and not any(map(_has_equals, clauses[:i])):
                return _clause(clauses[i])
            return _lead(_joined(clauses))
    return NOTHING


def _lead(tokens: Sequence[Token]) -> Quantity | Unread:
    """Read a sentence that begins with its quantity or is an equation; `NOTHING` for prose."""
    clauses = _clauses(tokens)
    if not clauses:
        return NOTHING
    for i in reversed(range(1, len(clauses))):
        if clauses[i][0].text.lower() in _CONCLUDES:
            return _concluded(_joined(clauses[i:]))
    first = _clause(clauses[0])
    if first is NOTHING and len(clauses) > 1 and not has_number(clauses[0]):
        return _lead(_joined(clauses[1:]))
    if isinstance(first, Unread):
        return first
    calculates = _calculates(clauses[0])
    total = first
    for i, clause in enumerate(clauses[1:], 1):
        bare = clause[1:] if clause[0].text.lower() in ("and", "or", "&") else clause
        of_variable = _has_equals(bare) and not _calculates(bare)
        if not bare or not (of_variable or bare[0].kind in ("number", "operator", "open")):
            if clause[0].text.lower() in ("and", "or", "but") and has_number(clause) and "not" not in _texts(clause):
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


def _clause(tokens: Sequence[Token]) -> Quantity | Unread:
    """Read a clause that begins with its quantity, after filler words, or is an equation."""
    if _has_equals(tokens):
        return _equation(tokens)
    return _quantity_with_tail(tokens[_skip_fillers(tokens, 0) :])


def _skip_fillers(tokens: Sequence[Token], i: int) -> int:
    return next((place for place in range(i, len(tokens)) if not _is_filler(tokens, place)), len(tokens))


def _is_filler(tokens: Sequence[Token], i: int) -> bool:
    word = tokens[i].text.lower()
    if word == "at":
        return i + 1 < len(tokens) and tokens[i + 1].text.lower() in ("least", "most")
    if word == "in":
        return i + 1 < len(tokens) and tokens[i + 1].text.lower() in ("total", "all")
    if word == "of":
        return i > 0 and tokens[i - 1].text.lower() in _TOTALS
    return word in _FILLERS or (tokens[i].kind == "other" and word in ":~'\"|•")


def _equation(tokens: Sequence[Token]) -> Quantity | Unread:
    """Read an equation: the side that is a number, not a calculation, of `3 * 6 = 18`, `18 = 3 * 6` or `x = 18`."""
    sides: list[list[Token]] = [[]]
    for token in tokens:
        if token.kind == "equals":
            sides.append([])
        else:
            sides[-1].append(token)
    filled = [side for side in sides if side]
    if not filled or filled[0][0].text.lower() in _SUPPOSES:
        return NOTHING
    if any(one.kind == "number" and other.glued and other.text in _VARIABLES for one, other in pairwise(tokens)):
        return UNCLEAR  # `6x = 18`
    if len(sides) > 1 and not sides[-1]:
        return UNCLEAR  # cut before the result
    last = _clause(filled[-1])
    if isinstance(last, Quantity) and not _has_operator(filled[-1]):
        first = _clause(filled[0])
        rounded = any(token.text in "≈→" for token in tokens)
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
    return UNCLEAR if prose is NOTHING and has_number(tokens) else prose


def _quantity_with_tail(tokens: Sequence[Token]) -> Quantity | Unread:
    """Read a quantity at the beginning, and check that the text after it does not change it."""
    parser = QuantityParser(tokens)
    found = parser.quantity()
    if isinstance(found, Unread):
        return found
    return found if _tail_is_harmless(tokens, parser.at, found) else UNCLEAR


def _tail_is_harmless(tokens: Sequence[Token], at: int, found: Quantity) -> bool:
    rest = list(tokens[at:])
    if not rest:
        return True
    head, after = rest[0], rest[1] if len(rest) > 1 else None
    word_after = (
        after is not None and after.kind == "word" and (len(after.text) > 1 or (after.glued and after.text in "hsmdwl"))
    )
    if head.kind == "command" or (head.kind in ("operator", "dash") and not (head.text in "-/–—" and word_after)):
        return head.text in "-+" and after is None
    if head.kind == "word" and head.glued and head.text in _VARIABLES:
        return False
    if head.kind == "word" and head.text in ("k", "K", "M", "B"):
        return False  # `18 K`: thousands, or kelvins
    if head.text in (".", "...") and after is not None and after.kind == "command":
        return False  # a period of decimals
    if head.kind in ("other", "percent") and head.text in "<>≤≥≠±:√π∞" and head.text != "%":
        return head.text == ":" and not has_number(rest)
    part = "/" in found.text or "%" in found.text or "." in found.text
    if _texts(rest[:1]) in (["times"], ["divided"], ["multiplied"]) and has_number(rest):
        return False
    if part and _texts(rest[:1]) in (["of"], ["off"]) and any(t.kind == "number" for t in rest[1:3]):
        return False  # `3/4 of 24`, `20% of 40`
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


def _compound(parts: Sequence[Sequence[Token]]) -> Quantity | None:
    parser = QuantityParser([token for part in parts for token in part])
    found = parser.quantity()
    return found if isinstance(found, Quantity) and parser.parts > 1 and not parser.rest_has_number() else None


def _prose(tokens: Sequence[Token]) -> Quantity | Unread:
    """Read a sentence in which only one number can be the answer: `In 3 days she picks 18 apples.`"""
    at = [i for i, token in enumerate(tokens) if token.kind == "number" and not is_named(tokens, i)]
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
        start = (
            i - 1 if i and tokens[i - 1].text in ("-", "(") and not (i > 1 and tokens[i - 2].kind == "number") else i
        )
        if start and tokens[start - 1].text.lower() in ("minus", "negative"):
            start -= 1
        parser = QuantityParser(tokens[start:])
        value = parser.quantity()
        if isinstance(value, Unread) or not _tail_is_harmless(tokens[start:], parser.at, value):
            return UNCLEAR
        skip = start + parser.at
        found[value.text] = value
    if len(found) > 1:
        return UNCLEAR
    return next(iter(found.values()), NOTHING)


def _is_one_of_several(tokens: Sequence[Token], i: int) -> bool:
    """True if the number at `i` is the end of a range or alternative (`18 to 20`), or only a bound (`> 18`, `±3`, `- 18`)."""
    before = tokens[i - 1] if i else None
    if before is None:
        return False
    if before.kind == "other" and before.text in "±<>≤≥≠√":
        return True
    if before.text == "-" and i == 1 and not tokens[i].glued:
        return True
    if before.text.lower() in ("twice", "double") or (before.text == "of" and _word_before(tokens, i - 1) in _SHARES):
        return True
    return (
        i > 1
        and tokens[i - 2].kind == "number"
        and (before.kind == "dash" or before.text.lower() in ("to", "or", "and"))
    )


def _is_about_something(tokens: Sequence[Token], i: int) -> bool:
    """True if the number at `i` follows a preposition, as in `of 6`, except as in `a total of 18`."""
    word = _word_before(tokens, i)
    return word in _REMARKS and not (word == "of" and _word_before(tokens, i - 1) in _TOTALS)


def _word_before(tokens: Sequence[Token], i: int) -> str:
    place = i - 1
    while place >= 0 and (tokens[place].kind in ("operator", "open") or tokens[place].text.lower() in _BEFORE_QUANTITY):
        place -= 1
    return tokens[place].text.lower() if place >= 0 and tokens[place].kind == "word" else ""


def _has_operator(tokens: Sequence[Token]) -> bool:
    """True if a side of an equation is a calculation: two numbers with an operator that is not a fraction bar."""
    numbers = [i for i, token in enumerate(tokens) if token.kind == "number"]
    plain_fraction = len(numbers) == 2 and tokens[numbers[0] + 1].text == "/" and numbers[1] == numbers[0] + 2
    return len(numbers) > 1 and not plain_fraction and any(token.kind == "operator" for token in tokens)


def _texts(tokens: Sequence[Token]) -> list[str]:
    return [token.text.lower() for token in tokens]


def _is_bare(tokens: Sequence[Token]) -> bool:
    return all(token.kind in ("number", "operator", "percent", "cent") for token in tokens)


def _has_equals(tokens: Sequence[Token]) -> bool:
    return any(token.kind == "equals" for token in tokens)


def _calculates(tokens: Sequence[Token]) -> bool:
    return _has_equals(tokens) and has_number(list(takewhile(lambda token: token.kind != "equals", tokens)))


def _joined(clauses: Sequence[Sequence[Token]]) -> list[Token]:
    """Join clauses with commas."""
    return [token for clause in clauses for token in [*clause, Token("comma", ",", False)]][:-1]
