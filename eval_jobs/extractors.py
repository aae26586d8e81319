"""Extractors: named conventions of reading and judging an answer in a model's text.

Any judge of an output is a `Scorer` (`verdicts`). Results differ silently with the way in which answers are read, so the
conventions are named and kept apart. All built-in ones that can read the gold answer run on every output; one is primary.
Each is an `Extractor`, a pair of functions: `read` finds the answer in a text (None if there is none), and `agrees`
compares it with the gold answer by the same convention. A new extractor is one function and one line in `EXTRACTORS`; a
user's own comes from the same registry (`choose_scorer`), by a name, a reference, or as a function.

- `answer`, the default, reads an answer in any usual form, and none if two readings are possible (`answers`, `quantities`).
  It compares exact values: `18.00`, `36/2` and "eighteen" equal `18`. A unit with parts may be counted in either: `550
  cents` is 550 or 5.5, `50%` is 50 or 0.5 (but `0.5` is not 50), `3 dozen` is 36 or 3. If the gold answer is not a number,
  it reads and compares texts (`texts`).
- `answer_line`, the default of older runs, reads the first number of the last line `Answer: …`; `boxed` that of the last
  `\\boxed{…}`. Both take the number out of its context: `1/2` is read as `1`. They compare numbers: `18.00` equals `18`.
- `gsm8k_strict`, `cot_strict` and `flexible` are lm-evaluation-harness's filters with its exact match: after `,`, `$`,
  everything up to `#### ` and a final `.` are removed, ignoring case. Their misreadings are kept, since published results
  contain them: `flexible` reads `$18.00` as `18.00`, which is not `18`, and `18 (see step 3)` as `3`; `cot_strict` requires
  a character after the number, so a text that ends with `The answer is 18` yields `1`.
- `math_verify` is Hugging Face's library of that name (`symbolic`).

The text may be anything, so all patterns take linear time, and only short arithmetic is evaluated.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from eval_jobs import EvalError
from eval_jobs.answers import read_answer
from eval_jobs.problems import Problem, is_number
from eval_jobs.quantities import same_quantity
from eval_jobs.symbolic import read_symbolic, same_expression
from eval_jobs.texts import inside_braces, read_text, same_text
from eval_jobs.verdicts import Output, Scorer, Verdict, run_scorer
from roentgen.contract import LabelValue
from roentgen.extensions import Extension, ExtensionError, Registry, given

_NUMBER = r"[-−]?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_ANSWER_LINE = re.compile(r"^[^\w\n]*answer[^\w\n]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_FIRST_NUMBER = re.compile(_NUMBER)
_GSM8K_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_COT_STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


class UnknownScorerError(EvalError):
    """A scorer cannot be found or used; the message names the option."""


@dataclass(frozen=True)
class Extractor:
    """A convention of reading and judging an answer; a `Scorer`."""

    read: Callable[[str], str | None]
    """Finds the answer in a text; None if there is none."""
    agrees: Callable[[str, str], bool]
    """True if an answer equals the gold answer."""
    of_texts: "Extractor | None" = None
    """The convention for text answers; None if the extractor reads only numbers."""

    def __call__(self, output: Output, problem: Problem) -> Verdict:
        """Judge an output."""
        convention = self if self.of_texts is None or is_number(problem.gold) else self.of_texts
        answer = convention.read(output)
        return Verdict(answer is not None and convention.agrees(answer, problem.gold), answer)

    def suits(self, problem: Problem) -> bool:
        """True if it can read an answer to the problem."""
        return self.of_texts is not None or is_number(problem.gold)


@dataclass(frozen=True)
class OutputScores:
    """The verdicts of several scorers on one output."""

    answers: dict[str, str | None]
    """The answer that each scorer read."""
    correct_by: dict[str, bool]
    """Whether each answer is correct."""
    values: dict[str, LabelValue] = field(default_factory=dict)
    """Additional values that they found."""


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
    return _first_number(inside_braces(content).replace("{,}", ",").replace("\\", ""))


def read_gsm8k_strict(text: str) -> str | None:
    """Read the first `#### 18`, as lm-evaluation-harness's `strict-match` of `gsm8k` does."""
    match = _GSM8K_STRICT.search(text)
    return match[1] if match else None


def read_cot_strict(text: str) -> str | None:
    """Read the first `The answer is 18.`, as lm-evaluation-harness's `strict-match` of `gsm8k_cot` does."""
    match = _COT_STRICT.search(text)
    return match[1] if match else None


def read_flexible(text: str) -> str | None:
    """Read the last number-like text, as lm-evaluation-harness's `flexible-extract` does."""
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
    DEFAULT_EXTRACTOR: Extractor(read_answer, same_quantity, of_texts=Extractor(read_text, same_text)),
    "answer_line": Extractor(read_answer_line, same_number),
    "gsm8k_strict": Extractor(read_gsm8k_strict, harness_match),
    "cot_strict": Extractor(read_cot_strict, harness_match),
    "flexible": Extractor(read_flexible, harness_match),
    "boxed": Extractor(read_boxed, same_number),
    "math_verify": Extractor(read_symbolic, same_expression),
}

SCORERS: Registry[Scorer] = Registry("roentgen.extractors", EXTRACTORS)


def choose_scorer(chosen: str | Scorer) -> Extension[Scorer]:
    """Resolve a name, a reference or a function to a scorer.

    Raises:
        UnknownScorerError: if it is unknown, not callable, or has the name of a built-in extractor.
    """
    try:
        found: Extension[Scorer] = SCORERS.find(chosen) if isinstance(chosen, str) else given(chosen)
    except ExtensionError as error:
        raise UnknownScorerError(f"--extractor: {error}") from error
    shown = f"--extractor: {found.reference or found.name}"
    if not callable(found.value):
        raise UnknownScorerError(f"{shown} is {type(found.value).__name__}; a scorer is a function (output, problem)")
    if not found.built_in and found.name in EXTRACTORS:
        raise UnknownScorerError(f"{shown}: {found.name!r} is the name of a built-in extractor; rename the function")
    return found


async def judge(
    output: Output, problem: Problem, scorers: Mapping[str, Scorer] = {}, timeout_s: float | None = None
) -> OutputScores:
    """Judge an output by the built-in extractors that suit the problem, and by the given scorers.

    Args:
        output: the output to judge.
        problem: the problem that it answers.
        scorers: additional scorers by name.
        timeout_s: timeout of a coroutine scorer in seconds; None for no timeout.

    Raises:
        ScorerError: if a scorer returns something other than a verdict.
        ScoringFailedError: if a scorer raises an exception or times out.
    """
    asked: dict[str, Scorer] = {name: one for name, one in EXTRACTORS.items() if one.suits(problem)}
    asked.update(scorers)
    return _scores({name: await run_scorer(name, scorer, output, problem, timeout_s) for name, scorer in asked.items()})


def score(text: str, gold: str) -> OutputScores:
    """Judge an output by every built-in extractor that suits its gold answer."""
    problem = Problem("", 0, "", "", gold)
    return _scores({name: one(Output(text), problem) for name, one in EXTRACTORS.items() if one.suits(problem)})


def _scores(verdicts: Mapping[str, Verdict]) -> OutputScores:
    return OutputScores(
        {name: verdict.answer for name, verdict in verdicts.items()},
        {name: verdict.correct for name, verdict in verdicts.items()},
        {name: value for verdict in verdicts.values() for name, value in verdict.values.items()},
    )


def _first_number(text: str) -> str | None:
    match = _FIRST_NUMBER.search(text)
    return match[0].translate({ord("$"): None, ord(","): None, ord("−"): "-"}) if match else None


def _harness_normal(text: str) -> str:
    """Apply the harness's regexes_to_ignore (its `.*#### ` takes quadratic time on long digits)."""
    return text.replace(",", "").replace("$", "").rpartition("#### ")[2].removesuffix(".").lower()
