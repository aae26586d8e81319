"""What the model's text says, by several conventions, and whether that is right.

GSM8K scores differ silently with the way the answer is read, so the ways are named, kept apart, and all of them run on
every output; one is primary. An `Extractor` is a pair: `read` finds the answer in a text (None if there is none), `agrees`
compares it with the gold answer by the same convention. A new extractor is one function and one line in `EXTRACTORS`.

- `answer`, the default, reads an answer however it is written, and none where two readings are possible (`answers`,
  `quantities`). It compares exact values: `18.00`, `36/2` and "eighteen" are `18`. A unit that has parts may be counted in
  either: `550 cents` is 550 or 5.5, `50%` is 50 or 0.5 (but `0.5` is not 50), `3 dozen` is 36 or 3.
- `answer_line`, the default of older runs, reads the first number of the last line `Answer: …`; `boxed` that of the last
  `\\boxed{…}`. Both take a number out of what stands there: `1/2` is read as `1`. They compare numbers: `18.00` is `18`.
- `gsm8k_strict`, `cot_strict` and `flexible` are lm-evaluation-harness's filters with its exact match: after `,`, `$`,
  everything up to `#### ` and a final `.` are removed, case ignored. Its misreads are kept, since published numbers contain
  them: `flexible` reads `$18.00` as `18.00`, which is not `18`, and `18 (see step 3)` as `3`; `cot_strict` wants a
  character after the number, so a text that ends with `The answer is 18` gives `1`.
- `math_verify` is Hugging Face's library of that name (`symbolic`).

The text is the model's, so it may be anything: patterns take linear time, and nothing is evaluated but short arithmetic.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from eval_jobs.answers import read_answer
from eval_jobs.quantities import same_quantity
from eval_jobs.symbolic import read_symbolic, same_expression

_NUMBER = r"[-−]?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_ANSWER_LINE = re.compile(r"^[^\w\n]*answer[^\w\n]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_FIRST_NUMBER = re.compile(_NUMBER)
_GSM8K_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_COT_STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


@dataclass(frozen=True)
class Extractor:
    """One convention of reading and judging an answer."""

    read: Callable[[str], str | None]
    """Finds the answer in a text, None if there is none."""
    agrees: Callable[[str, str], bool]
    """Whether an answer that was read is the gold one."""


@dataclass(frozen=True)
class Scores:
    """One output, judged by every extractor."""

    answers: dict[str, str | None]
    """What each extractor read."""
    correct_by: dict[str, bool]
    """Whether that is the gold answer."""


def read_answer_line(text: str) -> str | None:
    """Read the last line of the form `Answer: 18`; `**Answer:** $1,800.50 per year` gives `1800.50`.

    Of a line that calculates (`Answer: 3 * 6 = 18`) the result is read.
    """
    for line in reversed(_ANSWER_LINE.findall(text)):
        if (answer := _first_number(line.rpartition("=")[2])) is not None:
            return answer
    return None


def read_boxed(text: str) -> str | None:
    r"""Read the number inside the last `\boxed{...}`, which may hold markup: `\boxed{\$1{,}800}` gives `1800`."""
    content = text.rpartition("\\boxed{")[2] if "\\boxed{" in text else ""
    return _first_number(_inside_braces(content).replace("{,}", ",").replace("\\", ""))


def read_gsm8k_strict(text: str) -> str | None:
    """Read the first `#### 18`, as lm-evaluation-harness's `strict-match` of `gsm8k` does."""
    match = _GSM8K_STRICT.search(text)
    return match[1] if match else None


def read_cot_strict(text: str) -> str | None:
    """Read the first `The answer is 18.`, as lm-evaluation-harness's `strict-match` of `gsm8k_cot` does."""
    match = _COT_STRICT.search(text)
    return match[1] if match else None


def read_flexible(text: str) -> str | None:
    """Read the last thing that looks like a number, as lm-evaluation-harness's `flexible-extract` does."""
    found = [match[0] for match in _FLEXIBLE.finditer(text)]
    return found[-1] if found else None


def same_number(answer: str, gold: str) -> bool:
    """Compare as exact decimal numbers, of any length."""
    try:
        return Decimal(answer) == Decimal(gold)
    except InvalidOperation:
        return False


def harness_match(answer: str, gold: str) -> bool:
    """Compare as lm-evaluation-harness's exact match does with GSM8K's settings."""
    return _harness_normal(answer) == _harness_normal(gold)


DEFAULT_EXTRACTOR = "answer"

EXTRACTORS: dict[str, Extractor] = {
    DEFAULT_EXTRACTOR: Extractor(read_answer, same_quantity),
    "answer_line": Extractor(read_answer_line, same_number),
    "gsm8k_strict": Extractor(read_gsm8k_strict, harness_match),
    "cot_strict": Extractor(read_cot_strict, harness_match),
    "flexible": Extractor(read_flexible, harness_match),
    "boxed": Extractor(read_boxed, same_number),
    "math_verify": Extractor(read_symbolic, same_expression),
}


def score(text: str, gold: str) -> Scores:
    """Judge an output by every extractor."""
    answers = {name: extractor.read(text) for name, extractor in EXTRACTORS.items()}
    correct_by = {
        name: answer is not None and EXTRACTORS[name].agrees(answer, gold) for name, answer in answers.items()
    }
    return Scores(answers, correct_by)


def _first_number(text: str) -> str | None:
    match = _FIRST_NUMBER.search(text)
    return match[0].translate({ord("$"): None, ord(","): None, ord("−"): "-"}) if match else None


def _inside_braces(text: str) -> str:
    """Return what comes before the brace that closes the group `text` begins in; nothing if it is never closed."""
    depth = 0
    for place, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            if depth == 0:
                return text[:place]
            depth -= 1
    return ""


def _harness_normal(text: str) -> str:
    """Remove what the harness's regular expressions to ignore remove (its `.*#### ` takes quadratic time on long digits)."""
    return text.replace(",", "").replace("$", "").rpartition("#### ")[2].removesuffix(".").lower()
