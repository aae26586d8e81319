r"""Reads and compares text answers: a name, a choice, a word.

Reasoning in `<think>` and text after a new problem are ignored. The answer is the content of the first
`<answer>…</answer>`, else of the first `\boxed{…}`, else what follows the first `Final answer:`, `#### `, line `Answer: …`,
or `the answer is …`; else the text itself, if it is a single line. Two answers are equal if their words are, ignoring case,
spacing, quotes, markup and surrounding punctuation. In a multiple choice, `B`, `(B)` and `B) Paris` are the same choice.
"""

import re
import unicodedata

from eval_jobs.answers import after_reasoning, before_next_problem

LOOKED_AT = 100_000
"""Maximum characters of a text that are read."""

_TAG = re.compile(r"<answer>(.{0,2000}?)</answer>", re.IGNORECASE | re.DOTALL)
_BOX = "\\boxed{"
_MARKS = (
    re.compile(r"\bfinal answer\b[*_`]{0,4}(?: is)?[ \t]*[:=]?[*_` \t]{0,8}\n{0,2}([^\n]+)", re.IGNORECASE),
    re.compile(r"^#{4}[ \t]*([^\n]+)", re.MULTILINE),
    re.compile(r"^[^\w\n]{0,8}answer[^\w\n:]{0,8}:[*_` \t]{0,8}\n{0,2}([^\n]+)", re.IGNORECASE | re.MULTILINE),
    re.compile(r"\b(?:the|my) (?:correct )?answer is:?[ \t]*([^\n]+?)(?:[.!](?=\s|$)|$)", re.IGNORECASE | re.MULTILINE),
)
_WRAPPED = re.compile(r"^\\(?:text|mathrm|textbf|mathbf)\{(.*)\}$", re.DOTALL)
_AROUND = "\"'`*_.,;:!?()[]{}<>$\\“”‘’«»。"
_CHOICE = re.compile(r"\(?([a-z])(?:[).:]\s*|$)")


def read_text(text: str) -> str | None:
    """Read a text's answer; None if it has none."""
    text = before_next_problem(after_reasoning(text[-LOOKED_AT:])).strip()
    found = _marked(text)
    if found is None and "\n" not in text:
        found = text
    found = None if found is None else _WRAPPED.sub(r"\1", found.strip()).strip("*_` \t")
    return found or None


def same_text(answer: str, gold: str) -> bool:
    """True if two answers have the same words, or name the same choice."""
    one, other = _words(answer), _words(gold)
    if one == other:
        return bool(one)
    chosen = _CHOICE.match(_spelled(answer))
    return len(other) == 1 and chosen is not None and chosen[1] == other


def inside_braces(text: str) -> str:
    """Return the text before the brace that closes the group in which `text` begins; empty if it is never closed."""
    depth = 0
    for place, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            if depth == 0:
                return text[:place]
            depth -= 1
    return ""


def _marked(text: str) -> str | None:
    if tag := _TAG.search(text):
        return tag[1]
    if _BOX in text and (boxed := inside_braces(text.partition(_BOX)[2])):
        return boxed
    return next((match[1] for pattern in _MARKS if (match := pattern.search(text))), None)


def _spelled(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip("\"'`*_ ")


def _words(text: str) -> str:
    stripped = _spelled(text).strip(_AROUND + " ")
    return stripped or _spelled(text)
