"""Prompts: named, versioned and hashed.

A prompt turns a problem into messages. Its hash is part of every sample's configuration, so an edited prompt cannot be
confused with the original; raise `version` when you edit the text, for human readers. A new prompt is one line in
`PROMPTS`. Your own prompt is a text, in a file (`--prompt-file`) or in Python; or a reference to a text, a `Prompt`, or a
function that takes a problem and returns the user message or all messages.

A text contains `{question}` and optionally the names of additional record fields in braces; other braces are kept. A text
without `{question}` but with `{{` or `{%` is a Jinja template with the same variables.

`gsm8k`, `gsm8k_cot` and `gsm8k_cot_zeroshot` reproduce lm-evaluation-harness's tasks of these names (version 3.0) as it
poses them to a chat model (`--apply_chat_template`): the same messages, stop sequences, shots and answer extraction, so
that results are comparable. Shots that are the same for every problem belong to the prompt; shots drawn per problem are
part of the problem.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from eval_jobs import EvalError
from eval_jobs.chain_of_thought import CHAIN_OF_THOUGHT
from eval_jobs.extractors import DEFAULT_EXTRACTOR
from eval_jobs.problems import Problem, read_source
from eval_jobs.selection import DEFAULT_SHOTS
from roentgen.contract import canonical_hash
from roentgen.extensions import Extension, ExtensionError, Registry, format_error, given, preview

QUESTION = "{question}"

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
_PLAIN = re.compile(r"(?<!\{)\{question\}(?!\})")
_JINJA = re.compile(r"\{\{|\{%")
_ROLES = ("system", "developer", "user", "assistant")


class PromptError(EvalError):
    """A prompt cannot be used; the message names the option."""


@dataclass(frozen=True)
class Shot:
    """A solved problem shown before every problem."""

    question: str
    """As posed."""
    solution: str
    """The assistant's answer."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Additional fields of its record."""


PromptMessage = Mapping[str, Any]
Pose = Callable[[Problem], str | Sequence[PromptMessage]]
"""Takes a problem and returns the user message or all messages."""


@dataclass(frozen=True)
class Prompt:
    """How a problem is posed."""

    name: str
    """Name, as for `--prompt`."""
    version: int
    """Version, incremented with every edit."""
    user: str
    """The user message, with `{question}` where the question goes, or a Jinja template. For a prompt that is a function,
    the hash of its source."""
    system: str | None = None
    """The system message; None sends none."""
    shots: int = 0
    """Number of solved problems drawn for each problem and shown before it, each as a user and an assistant message."""
    fixed_shots: tuple[Shot, ...] = ()
    """Solved problems shown before every problem, in the same form."""
    stop: tuple[str, ...] = ()
    """Stop sequences."""
    extractor: str = DEFAULT_EXTRACTOR
    """Its default extractor."""
    shots_source: str = DEFAULT_SHOTS
    """The source of the shots."""
    pose: Pose | None = None
    """Creates the messages instead of `user`; None for a prompt that is a text."""

    @property
    def described(self) -> dict[str, Any]:
        """The prompt as recorded in a run."""
        shots = [asdict(shot) if shot.fields else _plain(shot) for shot in self.fixed_shots]
        told = {name: value for name, value in vars(self).items() if name != "pose"}
        return {**told, "stop": list(self.stop), "fixed_shots": shots, "hash": self.hash}

    @property
    def hash(self) -> str:
        """Hash of the name, the version and everything that the model is shown; the extractor is not part of it."""
        shown = {name: value for name, value in vars(self).items() if name not in ("extractor", "pose")}
        shown["fixed_shots"] = [asdict(shot) if shot.fields else _plain(shot) for shot in self.fixed_shots]
        # Prompts without these fields predate them.
        if not self.fixed_shots:
            del shown["fixed_shots"]
        if self.shots_source == DEFAULT_SHOTS:
            del shown["shots_source"]
        return canonical_hash(shown)

    def messages(self, problem: Problem, prefix: str = "") -> list[dict[str, Any]]:
        """Return the messages that pose a problem. A shot with the same question is omitted, because it contains the answer.

        Args:
            problem: the problem, with its shots if the prompt draws any.
            prefix: a variant's prefix of the last user message.

        Raises:
            PromptError: if the problem lacks a field that the prompt uses, or the prompt's function returns no messages.
        """
        messages: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        drawn = (Shot(shot.question, shot.solution, shot.fields) for shot in problem.shots)
        for shot in (*self.fixed_shots, *drawn):
            if shot.question == problem.question:
                continue
            posed = Problem("", 0, shot.question, shot.solution, "", fields=shot.fields)
            messages += [*self._ask(posed), {"role": "assistant", "content": shot.solution}]
        asked = self._ask(problem)
        if prefix:
            last = next(message for message in reversed(asked) if message["role"] == "user")
            last["content"] = f"{prefix}\n\n{last['content']}"
        return messages + asked

    def _ask(self, problem: Problem) -> list[dict[str, Any]]:
        if self.pose is not None:
            return _posed(self.name, self.pose, problem)
        if self.user == QUESTION:
            return [{"role": "user", "content": problem.question}]
        values = {**problem.fields, "question": problem.question}
        if _is_template(self.user):
            return [{"role": "user", "content": _render(self.name, self.user, values, problem)}]
        content = _FIELD.sub(lambda found: _spell(values[found[1]]) if found[1] in values else found[0], self.user)
        return [{"role": "user", "content": content}]


def _is_template(text: str) -> bool:
    return not _PLAIN.search(text) and bool(_JINJA.search(text))


def _plain(shot: Shot) -> dict[str, Any]:
    return {"question": shot.question, "solution": shot.solution}


def _spell(value: Any) -> str:
    """Format a field's value for a prompt; a list has one item per line."""
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@cache
def _template(text: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)


def _render(name: str, text: str, values: Mapping[str, Any], problem: Problem) -> str:
    try:
        return _template(text).render(values)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise PromptError(
            f"--prompt: the template {name} cannot be filled for {problem.problem_id}: {error}; the problem has "
            f"{', '.join(values)}"
        ) from error


def _posed(name: str, pose: Pose, problem: Problem) -> list[dict[str, Any]]:
    """Call a prompt's function and return its messages.

    Raises:
        PromptError: if it returns something else or raises an exception.
    """
    try:
        returned: Any = pose(problem)
    except Exception as error:
        raise PromptError(f"--prompt: {name} raised {format_error(error)} for {problem.problem_id}") from error
    if isinstance(returned, str) and returned.strip():
        return [{"role": "user", "content": returned}]
    told = list(returned) if isinstance(returned, Sequence) and not isinstance(returned, str | bytes) else None
    if not told or not all(
        isinstance(one, Mapping) and one.get("role") in _ROLES and one.get("content") is not None for one in told
    ):
        raise PromptError(
            f"--prompt: {name} returned {preview(returned)} for {problem.problem_id}; allowed are a text, the user message, "
            f'and a list of messages {{"role": …, "content": …}} with a role of {", ".join(_ROLES)}'
        )
    if not any(one["role"] == "user" for one in told):
        raise PromptError(f"--prompt: {name} returned no user message for {problem.problem_id}")
    return [dict(one) for one in told]


ANSWER_LINE = Prompt(
    name="answer-line",
    version=2,
    user="""Solve the last problem step by step, as in the examples. End with a line Answer: [number].

Problem: What is 7 + 2 - 4?
7 + 2 = 9. 9 - 4 = 5.
Answer: 5

Problem: Tom has 3 bags of 4 apples. How many apples does he have?
3 * 4 = 12.
Answer: 12

Problem: What is 2 - 8?
2 - 8 = -6.
Answer: -6

Problem: {question}""",
    stop=("\nProblem:",),
)
"""Reason step by step, then a last line `Answer: [number]`. The examples are for very small models: SmolLM2-135M,
instructed without examples, wrote no such line in 48 replies to `arithmetic`; with them it did in 15 of 24. The stop
sequence ends models that continue with a problem of their own."""

ANSWER_LINE_1 = replace(ANSWER_LINE, version=1, stop=(), extractor="answer_line")
"""The first version, without a stop sequence, so that runs started with it can be continued."""

GSM8K = Prompt(
    name="gsm8k",
    version=3,
    user="Question: {question}\nAnswer:",
    shots=5,
    stop=("Question:", "</s>", "<|im_end|>"),
    extractor="gsm8k_strict",
)

GSM8K_COT = Prompt(
    name="gsm8k_cot",
    version=3,
    user="Q: {question}\nA:",
    fixed_shots=tuple(Shot(*shot) for shot in CHAIN_OF_THOUGHT),
    stop=("Q:", "</s>", "<|im_end|>"),
    extractor="cot_strict",
)

GSM8K_COT_ZEROSHOT = Prompt(
    name="gsm8k_cot_zeroshot",
    version=3,
    user="Q: {question}\nA: Let's think step by step.",
    stop=("Q:", "</s>", "<|im_end|>"),
    extractor="cot_strict",
)

ANSWER_TEXT = Prompt(
    name="answer-text",
    version=1,
    user="""{question}

Think step by step. End with a line Answer: [answer].""",
)
"""The default prompt for problems with text answers."""

PROMPTS: Registry[Prompt] = Registry(
    "roentgen.prompts",
    {
        **{prompt.name: prompt for prompt in (ANSWER_LINE, ANSWER_TEXT, GSM8K, GSM8K_COT, GSM8K_COT_ZEROSHOT)},
        "answer-line-1": ANSWER_LINE_1,
    },
)


def choose_prompt(
    chosen: str | Prompt | Pose,
    file: Path | None = None,
    system: str | None = None,
    fixed_shots: int | None = None,
    shots_source: str | None = None,
    drawn_shots: int | None = None,
) -> Prompt:
    """Return a prompt.

    Args:
        chosen: a name in `PROMPTS`, a reference, a text with `{question}`, a prompt, or a function of a problem; ignored
            if `file` is given.
        file: a text file with the user message: a text with `{question}`, or a Jinja template.
        system: replaces the system message.
        fixed_shots: how many solved problems to show before every problem, in place of the shots that the prompt has: the first
            of its own fixed ones, or of where shots come from if it has none.
        shots_source: the source of shots, any source of problems; GSM8K's training set if absent.
        drawn_shots: number of shots drawn for each problem, instead of the prompt's shots.

    Raises:
        PromptError: if the prompt is unknown or lacks `{question}`, or there are too few shots.
        ProblemError: if the shots cannot be read.
    """
    prompt = find_prompt(chosen) if file is None else _read(file)
    if system is not None:
        prompt = replace(prompt, system=system)
    if shots_source is not None:
        prompt = replace(prompt, shots_source=shots_source)
    if drawn_shots is not None:
        prompt = replace(prompt, shots=drawn_shots, fixed_shots=())
    if fixed_shots is None:
        return prompt
    own = () if shots_source is not None else prompt.fixed_shots
    return replace(prompt, shots=0, fixed_shots=_first_shots(replace(prompt, fixed_shots=own), fixed_shots))


def check_prompt(prompt: Prompt, problems: Iterable[Problem]) -> None:
    """Check that a prompt can pose all problems, before anything runs.

    Raises:
        PromptError: if it cannot; the message names the problem.
    """
    if prompt.pose is not None or _is_template(prompt.user):
        for problem in problems:
            prompt.messages(problem)


def find_prompt(chosen: str | Prompt | Pose) -> Prompt:
    """Resolve a name, a reference, a text or an object to a prompt.

    Raises:
        PromptError: if it is not a prompt.
    """
    if isinstance(chosen, Prompt):
        return chosen
    if isinstance(chosen, str) and (QUESTION in chosen or _is_template(chosen)):
        return _of_text("text", chosen, "--prompt")
    try:
        found: Extension[Any] = (
            PROMPTS.find(chosen, f", a text with {QUESTION} in it") if isinstance(chosen, str) else given(chosen)
        )
    except ExtensionError as error:
        raise PromptError(f"--prompt: {error}") from error
    if isinstance(found.value, Prompt):
        return found.value
    if isinstance(found.value, str):
        return _of_text(found.name, found.value, f"--prompt: {found.reference}")
    if not callable(found.value):
        raise PromptError(
            f"--prompt: {found.reference or found.name} is {preview(found.value)}; allowed are a text, a Prompt, and a "
            "function of a problem"
        )
    return Prompt(name=found.name, version=1, user=str(found.digest), pose=found.value)


def _first_shots(prompt: Prompt, count: int) -> tuple[Shot, ...]:
    solved = (Shot(problem.question, problem.solution, problem.fields) for problem in read_source(prompt.shots_source))
    found = tuple(islice(prompt.fixed_shots or solved, count))
    if len(found) < count:
        default = "GSM8K's training set" if prompt.shots_source == DEFAULT_SHOTS else prompt.shots_source
        whose = f"the prompt {prompt.name}" if prompt.fixed_shots else default
        raise PromptError(f"--fixed-shots: {count} exceeds the {len(found)} of {whose}")
    return found


def _read(file: Path) -> Prompt:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--prompt-file: {file} cannot be read: {error}") from error
    return _of_text(file.stem, text, f"--prompt-file: {file}")


def _of_text(name: str, text: str, where: str) -> Prompt:
    if _is_template(text):
        try:
            _template(text)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(f"{where}: not a Jinja template: {error.message} (line {error.lineno})") from error
    elif QUESTION not in text:
        raise PromptError(f"{where} lacks {QUESTION}, where the question goes")
    return Prompt(name=name, version=1, user=text)
