"""Converts number words to digits: "eighteen" is 18, `two and a half` is 2 1/2, `one hundred and five` is 105."""

import re

_SMALL_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: value for value, word in enumerate(_SMALL_WORDS.split())}
_TENS = {word: 10 * value for value, word in enumerate(_TENS_WORDS.split(), 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5,
    "fifths": 5, "sixth": 6, "sixths": 6, "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10,
}  # fmt: skip
_WORD = "|".join([*_SMALL, *_TENS, "hundred", *_SCALES])
_SPELLED = rf"(?:{_WORD})(?:(?:[\s-]+(?:and\s+)?)(?:{_WORD}))*"
_LEADING = (
    r"(?:\s*(?:the|final|answer|is|are|about|approximately|exactly|only|just|a(?!\s+(?:dozen|half|quarter))|total|of|so|therefore|thus|hence|it's|it|we|get|"
    r"=|:|minus|negative)\b[\s:=]*)*"
)
_RUN = re.compile(
    rf"\b(?P<whole>{_SPELLED})(?:[\s-]+(?:and[\s-]+)?(?:(?P<over>one|two|three|four|five|seven|a)[\s-]+)?(?P<part>{'|'.join(_PARTS)}))?\b"
    rf"|\b(?:an?\s+|one[\s-]+)?(?P<alone>half|quarter)\b(?!\s*(?:of|a|an|dollars?|past)\b)"
    r"|\b(?P<dozen>a dozen|half a dozen|half-dozen)\b",
    re.IGNORECASE,
)


def number_words(text: str, anywhere: bool) -> str:
    """Replace number words by digits.

    Args:
        text: the text.
        anywhere: True to replace all of them, except a lone `one`, which is usually a pronoun; otherwise only those at the
            beginning of the text.
    """
    start = re.match(_LEADING, text, re.IGNORECASE)
    lead = start.end() if start else 0
    first = _RUN.match(text, lead)
    if first:
        text = text[:lead] + _digits(first) + text[first.end() :]
        lead += len(_digits(first))
    if not anywhere:
        return text
    return text[:lead] + _RUN.sub(lambda match: match[0] if match[0].lower() == "one" else _digits(match), text[lead:])


def _digits(match: re.Match[str]) -> str:
    if match["dozen"]:
        return "6" if match["dozen"].lower().startswith("half") else "12"
    if match["alone"]:
        return f"1/{_PARTS[match['alone'].lower()]}"
    words = re.findall(r"[a-z]+", match["whole"].lower())
    value = _value([word for word in words if word != "and"])
    if value is None:
        return match[0]
    if match["part"] is None:
        return str(value)
    under = _PARTS[match["part"].lower()]
    if match["over"]:
        return f"{value} {_SMALL.get(match['over'].lower(), 1)}/{under}"
    return f"{value} 1/{under}" if re.search(r"\band\b", match[0], re.IGNORECASE) else f"{value}/{under}"


def _value(words: list[str]) -> int | None:
    """Return the value of consecutive number words; None if they are several numbers, as `two three` is."""
    total = group = 0
    last = 10**15
    for word in words:
        if word in _SCALES:
            if not group or _SCALES[word] >= last:
                return None
            total, group, last = total + group * _SCALES[word], 0, _SCALES[word]
        elif word == "hundred":
            if not 0 < group < 100:
                return None
            group *= 100
        elif word in _TENS:
            if group % 100:
                return None
            group += _TENS[word]
        else:
            small = _SMALL[word]
            if group % 10 or (group % 100 and small >= 10) or (group and small == 0):
                return None
            group += small
    return total + group
