"""What the model's text says, by several conventions, and whether that is right.

Whoever judges an output is a `Scorer` (`verdicts`). Scores differ silently with the way the answer is read, so the ways are
named, kept apart, and all that are built in run on every output whose gold answer they can read; one is primary. These are
`Extractor`s, a pair each: `read` finds the answer in a text (None if there is none), `agrees` compares it with the gold answer
by the same convention. A new one is one function and one line in `EXTRACTORS`; a user's own comes from the same registry
(`choose_scorer`), by a name, a reference, or as a function.

- `answer`, the default, reads an answer however it is written, and none where two readings are possible (`answers`,
  `quantities`). It compares exact values: `18.00`, `36/2` and "eighteen" are `18`. A unit that has parts may be counted in
  either: `550 cents` is 550 or 5.5, `50%` is 50 or 0.5 (but `0.5` is not 50), `3 dozen` is 36 or 3. Where the gold answer is no
  number, it reads and compares texts (`texts`).
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
    """One convention of reading and judging an answer; a `Scorer`."""

    read: Callable[[str], str | None]
    """Finds the answer in a text, None if there is none."""
    agrees: Callable[[str, str], bool]
    """Whether an answer that was read is the gold one."""
    of_texts: "Extractor | None" = None
    """What it is where the gold answer is no number; None of a convention for numbers only."""

    def __call__(self, output: Output, problem: Problem) -> Verdict:
        """Judge an output."""
        convention = self if self.of_texts is None or is_number(problem.gold) else self.of_texts
        answer = convention.read(output)
        return Verdict(answer is not None and convention.agrees(answer, problem.gold), answer)

    def suits(self, problem: Problem) -> bool:
        """Whether it can read an answer to a problem."""
        return self.of_texts is not None or is_number(problem.gold)


@dataclass(frozen=True)
class OutputScores:
    """One output, judged by several scorers."""

    answers: dict[str, str | None]
    """What each read."""
    correct_by: dict[str, bool]
    """Whether that is right."""
    values: dict[str, LabelValue] = field(default_factory=dict)
    """What else they found."""


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
    """Return the scorer that a name, a reference or a function means.

    Raises:
        UnknownScorerError: if it is unknown, cannot be called, or is called like one that is built in.
    """
    try:
        found: Extension[Scorer] = SCORERS.find(chosen) if isinstance(chosen, str) else given(chosen)
    except ExtensionError as error:
        raise UnknownScorerError(f"--extractor: {error}") from error
    shown = f"--extractor: {found.reference or found.name}"
    if not callable(found.value):
        raise UnknownScorerError(
            f"{shown} is {type(found.value).__name__}, and a scorer is a function (output, problem)"
        )
    if not found.built_in and found.name in EXTRACTORS:
        raise UnknownScorerError(f"{shown}: {found.name!r} is one that is built in; call the function otherwise")
    return found


async def judge(
    output: Output, problem: Problem, scorers: Mapping[str, Scorer] = {}, timeout_s: float | None = None
) -> OutputScores:
    """Judge an output by the extractors that suit the problem, and by scorers of one's own or a built-in one that is chosen.

    Args:
        output: what to judge.
        problem: what it answers.
        scorers: by name.
        timeout_s: how long a scorer that is a coroutine may wait; for ever if None.

    Raises:
        ScorerError: if a scorer returns what is no verdict.
        ScoringFailedError: if one raises an exception, or takes too long.
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
    """Remove what the harness's regular expressions to ignore remove (its `.*#### ` takes quadratic time on long digits)."""
    return text.replace(",", "").replace("$", "").rpartition("#### ")[2].removesuffix(".").lower()
